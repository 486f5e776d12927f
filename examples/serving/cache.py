"""The cache is a setting of each request: one seed with four settings, and the steps that each skipped."""

from __future__ import annotations

from openai import OpenAI

client = OpenAI()  # OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none

for cache in ("off", "high", "fast", {"threshold": 0.12, "max_skip_steps": 3}):
    made = client.images.generate(prompt="red apple", extra_body={"seed": 7, "cache": cache, "include_timings": True})
    (how,) = made.model_extra["omni"]["images"]
    print(cache, "->", how["computed_steps"], "computed,", how["skipped_steps"], "skipped,", how["timings"]["total_s"])
