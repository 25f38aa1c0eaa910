"""How fast training is, how much memory it has needed, and how long it will take."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager

import torch

WINDOW = 50  # optimizer steps that the current rate is taken over
GIB = 2**30


class ProgressMeter:
    """Counts optimizer steps against a clock that stands still within :meth:`pause`.

    Args:
        samples_per_step: over all processes. steps: of the whole run. first: the step that this part of it starts after.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        samples_per_step: int,
        steps: int,
        first: int = 0,
        *,
        device: torch.device | str = "cpu",
        clock: Callable[[], float] = time.monotonic,
    ):
        self.samples_per_step, self.left = samples_per_step, steps - first
        self.device, self.clock = torch.device(device), clock
        self.paused = 0.0
        self.ends = deque([self._now()], maxlen=WINDOW + 1)

    def _now(self) -> float:
        return self.clock() - self.paused

    def step(self) -> None:
        """One more optimizer step is done."""
        self.ends.append(self._now())
        self.left -= 1

    @contextmanager
    def pause(self):
        """Time within it, of a validation or a checkpoint, is none of training's."""
        before = self.clock()
        try:
            yield
        finally:
            self.paused += self.clock() - before

    @property
    def seconds_per_step(self) -> float:
        """Of the last steps; 0 before the first."""
        return (self.ends[-1] - self.ends[0]) / max(1, len(self.ends) - 1)

    @property
    def images_per_second(self) -> float:
        return self.samples_per_step / self.seconds_per_step if self.seconds_per_step else 0.0

    @property
    def seconds_left(self) -> float:
        """Until the last step at the current rate, without validations and checkpoints."""
        return self.left * self.seconds_per_step

    def scalars(self) -> dict[str, float]:
        """For a tracker: images/s over all processes, seconds per step, peak memory in GiB, minutes left."""
        return {
            "images_per_second": self.images_per_second,
            "seconds_per_step": self.seconds_per_step,
            "peak_memory_gib": peak_memory(self.device) / GIB,
            "minutes_left": self.seconds_left / 60,
        }

    def postfix(self) -> dict[str, str]:
        """For a progress bar, which shows seconds per step and the time left by itself."""
        return {"img/s": f"{self.images_per_second:.1f}", "GiB": f"{peak_memory(self.device) / GIB:.1f}"}


def peak_memory(device: torch.device) -> int:
    """Bytes that were in use at most: on a GPU by torch, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes but on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
