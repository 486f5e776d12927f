"""The `vllm-omni` command: runs a sub-command. Each is a module beside this one, imported when it is asked for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from vllm_omni import packages
from vllm_omni.envs import grow_segments, spin_briefly
from vllm_omni.errors import OmniError
from vllm_omni.version import __version__

COMMANDS = {  # a module's name and the first line of its help; the module has `add_parser` and `run`
    "serve": "Serve a model behind the OpenAI API for images and videos.",
    "ray": "Serve a model from several machines, on Ray Serve.",
    "generate": "Draw prompts (and pictures) to PNG or video files, and print a table.",
    "calibrate": "Measure a model into a profile, from which the cache plans its steps.",
    "bench": "Put load on a running server, and print throughput, latency and errors.",
    "quality": "Compare cached with uncached pictures: tables, a chart, a sheet.",
}
EXAMPLES = """examples:
  vllm-omni generate demo 'red apple' 'cat face' --steps 28 --cache-backend magcache
  vllm-omni serve demo --cache-backend magcache                   the same as `vllm serve demo --omni ...`
  vllm-omni COMMAND --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; 0, or 2 with one clear line on stderr for input that cannot be used, or 130 after Ctrl-C.

    vLLM comes here too, with its own command line: `vllm serve MODEL --omni ...`.
    """
    code = _run([word for word in (sys.argv[1:] if argv is None else argv) if word != "--omni"])
    if argv is None and "--omni" in sys.argv:  # vLLM does not look at what it gets back
        sys.exit(code)
    return code


def _run(words: Sequence[str]) -> int:
    name = next((word for word in words[:1] if word in COMMANDS), None)
    module = import_module(f"vllm_omni.entrypoints.cli.{name}") if name else None
    parser = argparse.ArgumentParser(
        prog="vllm-omni",
        description="Generate and serve pictures with diffusion transformers, with an activation cache per request.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    own = parser
    for command, summary in COMMANDS.items():
        if module is not None and command == name:
            own = module.add_parser(commands, summary)
        else:
            commands.add_parser(command, help=summary)
    if module is None and "--omni" in sys.argv:
        what = f"`vllm {words[0]} --omni`" if words else "`vllm --omni`"
        parser.error(f"{what} is nothing for diffusion models; leave --omni out, and vLLM handles it itself")
    # `serve` has vLLM's parser, which takes seconds to import: it parses by itself
    args, rest = (argparse.Namespace(words=words[1:]), []) if name == "serve" else parser.parse_known_args(words)
    packages.hide_unloadable()
    spin_briefly(os.environ)
    grow_segments(os.environ)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns once per image processor without torchvision
    assert module is not None  # anything else has ended in the parser
    try:
        if (message := packages.conflict()) is not None:
            raise OmniError(message)
        if rest:
            from vllm_omni.entrypoints.cli.flags import flags_of, unknown_flags

            flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
            raise OmniError(unknown_flags(flags, flags_of(own)) or f"{rest[0]!r} has no meaning here; see --help")
        return module.run(args)
    except OmniError as error:
        print(f"vllm-omni {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vllm-omni {name}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
