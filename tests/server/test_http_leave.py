"""Clients that leave while their request is queued, encoded, denoised, decoded, written out and streamed; its bytes.

The long run, of all routes, is `stress/http_leave.py`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import pytest
from http_server import repaint_folder
from leaving import Leaving, leaving
from PIL import Image


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Leaving]:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "orange").save(buffer, "PNG")
    model = str(repaint_folder(tmp_path_factory.mktemp("models")))
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    with leaving("edits", model, buffer.getvalue(), url) as made:
        yield made


@pytest.mark.parametrize("name", ["edits", "edits-stream", "chat", "chat-stream"])
def test_a1_leaving_at_every_point(clients: Leaving, name: str) -> None:
    """Dropped within one step, and nothing of it is left: no job, no request, no byte of its cache."""
    for point in (route := clients.routes[name]).points:
        left = clients.run(route, point, 2)
        assert left.count == 2 and left.most_steps_after <= 1 and not left.wrong, (point, left)
        assert left.longest_s < 1.0, (point, left)


def test_m3_the_gauge_is_what_the_tensors_hold(clients: Leaving) -> None:
    body = {"prompt": "x", "steps": "60", "strength": "1.0", "cache": "fast"}
    reply = clients.http.post("/v1/images/edits", data=body, files={"image": clients.png})
    assert reply.status_code == 200, reply.text
    counted = clients.counted
    assert all(gauge == live for gauge, live in counted) and max(counted)[0] > 0
