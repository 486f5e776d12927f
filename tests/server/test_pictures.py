"""Pictures that clients send: bad ones are refused cheaply, good ones decode to their pixels, no address is opened."""

from __future__ import annotations

import base64
import io

import httpx
import numpy as np
import pytest
from hostile import (
    as_quick,
    bad_pictures,
    good_pictures,
    saved,
    scene,
)
from http_replies import envelope, told
from http_server import EDITS, Command, Running
from PIL import Image

from vllm_omni.outputs.media import open_image

BAD, GOOD = bad_pictures(), good_pictures()


@pytest.mark.alone
@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_refused_at_little_cost(process: Command, process_http: httpx.Client, name: str) -> None:
    def ask() -> httpx.Response:
        return process_http.post(
            EDITS, data={"prompt": "x", "steps": "1"}, files={"image": ("a.png", BAD[name], "image/png")}
        )

    ask()
    process.forget_peak()
    before = process.status("VmRSS")
    error = told(ask())
    assert (error["code"], error["param"]) == ("invalid_image", "image")
    served = {"prompt": "x", "steps": "1", "strength": "1.0"}
    assert as_quick(ask, lambda: process_http.post(EDITS, data=served, files={"image": saved(scene())}), 3)
    assert process.status("VmHWM") - before < 50_000, "KiB"
    url = "data:image/png;base64," + base64.b64encode(BAD[name]).decode()
    assert told(process_http.post(EDITS, data={"prompt": "x", "url": url}, files={"a": (None, "")}))["param"] in (
        "url",
        "a",
    )


def made(process_http: httpx.Client, picture: bytes) -> np.ndarray:
    """What little strength makes of it."""
    fields = {"prompt": "x", "steps": "4", "strength": "0.3", "seed": "1", "cache": "off"}
    reply = process_http.post(EDITS, data=fields, files={"image": picture})
    assert reply.status_code == 200, reply.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"]))))


@pytest.mark.parametrize("name", GOOD)
def test_a_good_picture_is_decoded_to_its_pixels(process_http: httpx.Client, name: str) -> None:
    """Decoded to the right pixels; over HTTP the result is that of the upright RGB picture."""
    data, wanted = GOOD[name]
    assert wanted.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(wanted))
    if "JPEG" in name:  # and those are the colours that were put in
        assert np.abs(np.asarray(wanted, dtype=int) - np.asarray(scene())).mean() < 3
    if name == "PNG":
        assert not np.array_equal(
            made(process_http, data), made(process_http, saved(wanted.transpose(Image.Transpose.ROTATE_180)))
        )
    np.testing.assert_array_equal(made(process_http, data), made(process_http, saved(wanted)))


@pytest.mark.slow
def test_an_address_that_is_not_allowed_is_never_opened(repainter: Running) -> None:
    fetched = httpx.post(repainter.url + "/v1/images/edits",
                         files={"prompt": (None, "x"), "url": (None, "http://127.0.0.1:1/x.png")})  # fmt: skip
    envelope(fetched, 400, "invalid_image", "url")
