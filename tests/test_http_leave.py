"""Clients that leave while their request is queued, encoded, denoised, decoded, written out and streamed.

The long run, of all routes, is `stress/http_leave.py`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import pytest
from http_server import repainting_demo
from leaving import Leaving, leaving
from PIL import Image


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Leaving]:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "orange").save(buffer, "PNG")
    model = str(repainting_demo(tmp_path_factory.mktemp("models") / "repaint"))
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
