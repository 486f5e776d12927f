"""Previews while a picture is made: each event is a whole picture."""

from __future__ import annotations

import base64
from pathlib import Path

from openai import OpenAI

client = OpenAI()  # OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none

stream = client.images.generate(prompt="red apple", stream=True, partial_images=3, extra_body={"seed": 7})
for event in stream:
    index = getattr(event, "partial_image_index", "final")
    Path(f"apple-{index}.png").write_bytes(base64.b64decode(event.b64_json))
    print(event.type, index)
