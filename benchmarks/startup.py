"""How long until something happens: `import vllm_omni`, loading the demo model, its first picture. New processes each.

Bars: import < 0.3 s; demo ready to serve < 20 s on 2 cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from common import Timing, arguments, begin, last_line, table

_FIRST_PICTURE = """
import json, time
t0 = time.perf_counter()
from vllm_omni import Omni, OmniDiffusionSamplingParams
omni = Omni({model!r})
t1 = time.perf_counter()
outputs = [omni.generate("red apple", {{"num_inference_steps": 28, "seed": 0}}, use_tqdm=False)[0]]
t2 = time.perf_counter()
outputs += [omni.generate("red apple", {{"num_inference_steps": 28, "seed": 0}}, use_tqdm=False)[0]]
t3 = time.perf_counter()
errors = [o.error for o in outputs if o.error]
if errors:
    raise errors[0]
print(json.dumps({{"load": t1 - t0, "first picture": t2 - t1, "second picture": t3 - t2}}))
"""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "startup", **begin(options)}
    timings = {
        name: Timing() for name in ("python alone", "import vllm_omni", "load", "first picture", "second picture")
    }
    for _ in range(options.repeats):
        timings["python alone"].seconds.append(_seconds("pass"))
        timings["import vllm_omni"].seconds.append(_seconds("import vllm_omni"))
    for _ in range(max(1, options.repeats // 2)):
        for name, seconds in json.loads(_run(_FIRST_PICTURE.format(model=options.model)).splitlines()[-1]).items():
            timings[name].seconds.append(seconds)
    table(["s", "median", "spread"], [[name, t.median, t.spread] for name, t in timings.items()])
    last_line(result | {name: t.median for name, t in timings.items()})


def _run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True
    ).stdout


def _seconds(code: str) -> float:
    began = time.perf_counter()
    _run(code)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
