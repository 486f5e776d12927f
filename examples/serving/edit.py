"""Repaint a picture: for a model that takes one (an image-to-image or edit pipeline)."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from openai import OpenAI

if len(sys.argv) < 3:
    sys.exit("usage: edit.py PICTURE PROMPT")
client = OpenAI()  # OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none

made = client.images.edit(image=Path(sys.argv[1]), prompt=sys.argv[2], extra_body={"seed": 7})
Path("edited.png").write_bytes(base64.b64decode((made.data or [])[0].b64_json or ""))
