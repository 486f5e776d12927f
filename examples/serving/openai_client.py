"""The official client against `vllm serve demo --omni`: two pictures with their seeds, sizes and costs."""

from __future__ import annotations

import base64
from pathlib import Path

from openai import OpenAI

client = OpenAI()  # OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none

made = client.images.generate(prompt="red apple", n=2, size="auto", extra_body={"seed": 7, "num_inference_steps": 28})
for entry in made.data or []:
    file = Path(f"apple-{entry.model_extra['seed']}.png")
    file.write_bytes(base64.b64decode(entry.b64_json))
    print(f"{file}: {made.size}")
print(made.usage)
