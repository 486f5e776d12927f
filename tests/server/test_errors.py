"""What clients are told of the package's own errors."""

from __future__ import annotations

import json

import pytest

from vllm_omni import errors
from vllm_omni.entrypoints.openai.protocol.errors import as_api_error
from vllm_omni.errors import DeviceMemoryError, OmniError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OmniError)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not OmniError])
def test_every_error_of_ours_has_a_code_of_its_own_and_its_text(kind: type[OmniError]) -> None:
    error = kind.__new__(kind)
    error.args = ("what would be right",)
    vars(error).update(field="size", retry_after_s=2.0)
    told = as_api_error(error)
    assert told.code != "engine_error" and told.message == "what would be right"


def test_a_request_that_does_not_fit_is_not_repeated_and_is_told_what_would() -> None:
    text = "the request does not fit on cuda:0 even alone; ask for at most 50% of its pixels"
    reply = as_api_error(DeviceMemoryError(text)).response()
    assert (reply.status_code, reply.headers["x-should-retry"]) == (400, "false")
    told = json.loads(bytes(reply.body))["error"]
    assert (told["message"], told["type"], told["code"]) == (text, "invalid_request_error", "out_of_memory")
