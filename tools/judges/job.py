"""Something that trains: so many steps, in turns, from and to one file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SAVE_SECONDS = 120.0


class Job:
    def __init__(self, name: str, file: Path, steps: int, batch: int):
        self.name, self.file, self.steps, self.batch = name, file, steps, batch
        self.done, self.seconds, self.loss = 0, 0.0, math.nan
        self.parts: dict[str, Any] = {}

    def resume(self, parts: dict[str, Any]) -> None:
        """Keep these modules and optimizers in the file, and take them from it where it exists."""
        self.parts = parts
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.done, self.seconds, self.loss = state["step"], state["seconds"], state["loss"]

    def train(self) -> float:
        """One step; returns its loss."""
        raise NotImplementedError

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".tmp")
        torch.save(state | {"step": self.done, "seconds": self.seconds, "loss": self.loss}, temporary)
        temporary.replace(self.file)

    def run(self, seconds: float, stopped: Callable[[], bool]) -> bool:
        """Train for so long or until told to stop; returns whether all steps are done."""
        begin = saved = logged = time.monotonic()
        before, first = self.seconds, self.done
        while self.done < self.steps and time.monotonic() - begin < seconds and not stopped():
            loss = self.train()
            self.loss = loss if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss
            self.done += 1
            now = time.monotonic()
            self.seconds = before + now - begin
            if now - logged > 20:
                rate = (self.done - first) / (now - begin)
                print(
                    f"{time.strftime('%H:%M:%S')} {self.name} step {self.done}/{self.steps} loss {self.loss:.4f} "
                    f"{rate:.2f} steps/s {rate * self.batch:.0f} scenes/s",
                    flush=True,
                )
                logged = now
            if now - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()
        return self.done >= self.steps
