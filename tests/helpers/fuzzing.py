"""Requests that schemathesis makes of a server's own description, and what every reply to them must keep."""

from __future__ import annotations

import copy
import io
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import httpx
import requests
import schemathesis
from hostile import PRIVATE
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from hypothesis.stateful import run_state_machine_as_test
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    use_after_free,
)

CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
MODES = ("told", "meant", "wrong")  # as described; narrowed to what this model can make; invalid


def pictures() -> list[bytes]:
    """Small ones of every kind, and one that is none."""
    kinds = [("RGB", "PNG"), ("RGBA", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "WEBP"), ("P", "PNG")]
    made = []
    for mode, kind in kinds:
        buffer = io.BytesIO()
        Image.new(mode, (32, 48)).save(buffer, kind)
        made.append(buffer.getvalue())
    return [*made, made[0][:-20]]


@dataclass
class Fuzz:
    """One server. `failures` are texts; `slowest` is in seconds; `statuses` by operation and kind of case."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    limit_s: float | None = None
    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    over_limit: int = 0

    @cached_property
    def document(self) -> dict[str, Any]:
        return httpx.get(self.url + "/openapi.json", headers=self.headers, timeout=60).json()

    @cached_property
    def model(self) -> dict[str, Any]:
        return httpx.get(self.url + "/v1/models", headers=self.headers, timeout=60).json()["data"][0]

    def schema(self, mode: str) -> Any:
        document = copy.deepcopy(self.document)
        document["paths"].pop("/sleep", None)  # whatever came after it would be a 503
        if mode == "meant":
            narrow(document, self.model)
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=self.url)
        return schema

    def operations(self, mode: str, cases: int, only: str = "", number: int = 0) -> None:
        """So many cases of each operation whose "METHOD /path" matches `only`."""
        for result in self.schema(mode).get_all_operations():
            operation = result.ok()
            if re.search(only, operation.label) and (mode != "meant" or operation.body):
                self._operation(operation, mode, cases, number)

    def _operation(self, operation: Any, mode: str, cases: int, number: int) -> None:
        name, seen = f"{operation.label} {mode}", Counter[int]()
        kind = GenerationMode.NEGATIVE if mode == "wrong" else GenerationMode.POSITIVE

        @seed(number)
        @given(case=operation.as_strategy(generation_mode=kind), picture=st.sampled_from(pictures()))
        @settings(max_examples=cases, deadline=None, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        def ask(case: Any, picture: bytes) -> None:
            if mode == "meant" and isinstance(case.body, dict):
                for part in {"image", "input_reference"} & case.body.keys():
                    case.body[part] = picture
            reply = self.call(case, name, seen)
            case.validate_response(reply, checks=CHECKS)

        self.statuses[name] = seen
        try:
            ask()
        except Unsatisfiable:  # nothing is invalid for a route without fields
            pass
        except (Exception, FailureGroup) as error:  # told at the end, with those of the other operations
            self.failures.append(f"{name}: {error}"[:1500])

    def sequences(self, count: int, steps: int = 8, number: int = 0) -> int:
        """Chains of operations, where one takes what another gave; the number of requests."""
        fuzz, seen = self, Counter[int]()

        class Chains(self.schema("meant").as_state_machine()):  # type: ignore[misc]
            def call(self, case: Any, **options: Any) -> Any:
                return fuzz.call(case, "sequence", seen)

            def validate_response(self, response: Any, case: Any, **options: Any) -> None:
                case.validate_response(response, checks=[*CHECKS, use_after_free], **options)

        limits = settings(max_examples=count, stateful_step_count=steps, deadline=None, database=None,
                          phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
        try:
            run_state_machine_as_test(seed(number)(Chains), settings=limits)
        except (Exception, FailureGroup) as error:
            self.failures.append(f"sequence: {error}"[:1500])
        self.statuses["sequences"] = seen
        return seen.total()

    def call(self, case: Any, name: str, seen: Counter[int]) -> Any:
        """A reply below 500 (or that says when to come back), whose text tells nothing of the server."""
        reply = case.call(headers=self.headers, session=self.session, timeout=60)
        seen[reply.status_code] += 1
        self.slowest = max(self.slowest, (reply.elapsed, name))
        self.over_limit += self.limit_s is not None and reply.elapsed > self.limit_s
        text = reply.content[:100_000].decode("utf-8", "replace")
        if reply.status_code not in (503, 504):
            case.validate_response(reply, checks=[not_a_server_error])
        if reply.status_code >= 400:
            assert not PRIVATE.search(text) and len(reply.content) < 4096, text
        if "event-stream" in str(reply.headers.get("content-type")):
            stream(reply.content.decode())
        return reply

    @cached_property
    def session(self) -> requests.Session:
        return requests.Session()


def stream(text: str) -> None:
    """Events of a stream: each is JSON, and the last says how it ended."""
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    events = [json.loads(one) for one in data if one != "[DONE]"]
    last = str(events[-1].get("type"))
    assert data[-1] == "[DONE]" or last.endswith(".completed") or last == "error", events[-1]


def narrow(document: dict[str, Any], model: dict[str, Any]) -> None:
    """Leave of the described requests those that this model can make, so that most of them reach the engine."""
    omni = model["omni"]
    limits, multiple = omni["limits"], omni["limits"]["size_multiple"]
    own = 2 * omni["defaults"].get("width", 32)  # one step of a picture as large as allowed may take minutes
    most = min(int(limits["pixels"] ** 0.5), own)
    side = {"type": "integer", "multipleOf": multiple, "minimum": multiple, "maximum": most}
    cache = {
        "anyOf": [
            {"enum": ["off", "auto", *(omni["cache"].get("presets") or {})]},
            {"type": "object", "additionalProperties": False,
             "properties": {"threshold": {"type": "number", "minimum": 0, "maximum": 1},
                            "max_skip_steps": {"type": "integer", "minimum": 0, "maximum": 9}}},
        ]
    }  # fmt: skip
    words = {"type": "string", "pattern": "^[a-z ☃]{1,80}$"}
    change: dict[str, Any] = {
        "prompt": words, "negative_prompt": words, "model": {"const": model["id"]}, "size": {"const": "auto"},
        "width": side, "height": side, "n": {"type": "integer", "minimum": 1, "maximum": limits["n"]},
        "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": limits["num_inference_steps"]},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, "cache": cache,
        "timeout_s": {"type": "number", "minimum": 0.05, "maximum": limits["timeout_s"]},
        "guidance_scale": {"type": "number", "minimum": 0, "maximum": 10},
        "true_cfg_scale": {"type": "number", "minimum": 0, "maximum": 10},
        "strength": {"type": "number", "minimum": 0.3, "maximum": 1}, "background": {"enum": ["opaque", "auto"]},
        "response_format": {"const": "b64_json"}, "output_format": {"enum": ["jpeg", "webp"]},
        "num_frames": {"enum": [1 + k * limits.get("frame_multiple", 1) for k in range(3)]},
    }  # fmt: skip
    text = {"type": "object", "required": ["role", "content"], "additionalProperties": False,
            "properties": {"role": {"const": "user"}, "content": words}}  # fmt: skip
    without = {"lora", "seconds", "guidance_scale_2", "boundary_ratio", "control_image"}
    if not omni["capabilities"]["input_reference"]:
        without |= {"mask", "input_reference"}
    if not omni["capabilities"]["edits"]:
        without.add("strength")
    if not omni["capabilities"]["negative_prompt"]:
        without.add("negative_prompt")
    for entry in document["paths"].values():
        for media in entry.get("post", {}).get("requestBody", {}).get("content", {}).values():
            told = media["schema"]
            told["additionalProperties"] = False
            told["properties"] = {
                key: change.get(key, value) for key, value in told["properties"].items() if key not in without
            }
            if "messages" in told["properties"]:
                told["properties"]["messages"] = {"type": "array", "minItems": 1, "maxItems": 3, "items": text}
