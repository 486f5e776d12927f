"""The official client against `vllm serve MODEL --omni` with a video model: a job, its progress, its files."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from openai import OpenAI

if len(sys.argv) < 2:
    sys.exit("usage: video.py PROMPT [SECONDS [SIZE]]")
seconds, size = [*sys.argv[2:4], *("4", "auto")[len(sys.argv) - 2 :]]
client = OpenAI()  # OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none

video = client.videos.create(prompt=sys.argv[1], seconds=seconds, size=size, extra_body={"seed": 7})  # type: ignore
while video.status in ("queued", "in_progress"):  # videos.create_and_poll waits too, and tells no progress
    time.sleep(0.5)
    video = client.videos.retrieve(video.id)
    print(f"{video.status}: {video.progress} %")
if video.status == "failed":
    sys.exit(f"failed: {video.error and video.error.message}")
client.videos.download_content(video.id).write_to_file(Path(f"{video.id}.mp4"))
client.videos.download_content(video.id, variant="thumbnail").write_to_file(Path(f"{video.id}.webp"))
print(f"{video.id}.mp4: {video.seconds} s of {video.size}")
client.videos.delete(video.id)
