"""When training must stop before its end: a signal, a time limit, or losses that aren't numbers.

A signal only leaves a note; the loop looks at it between steps, where weights, optimizer and random states belong together,
writes a checkpoint and ends. The next run resumes there, and its result is the uninterrupted one's.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable

import torch

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """Told to stop before the first step; the message says by what."""


class Interruption:
    """Why training should stop, if it should: the first of SIGTERM, SIGINT and the time limit. A second signal ends at once.

    Args:
        time_limit: minutes from now; None for no limit.
        clock: seconds, for tests.
    """

    def __init__(self, time_limit: float | None = None, clock: Callable[[], float] = time.monotonic):
        self.clock, self.signal, self.before = clock, None, {}
        self.end = None if time_limit is None else clock() + 60 * time_limit

    def __enter__(self) -> Interruption:
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.signal = number

    @property
    def reason(self) -> str | None:
        """What to tell the user, or None where nothing has happened."""
        if self.signal is not None:
            return signal.Signals(self.signal).name
        return "the time limit" if self.end is not None and self.clock() >= self.end else None

    def check(self) -> None:
        """For long work before the first step, which is resumed by being asked for again. Raises Interrupted."""
        if self.reason is not None:
            raise Interrupted(self.reason)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it; 0 for the time limit, which the user asked for."""
        return 0 if self.signal is None else 128 + self.signal


class Rescue:
    """Writes a checkpoint of the last whole step when something fails after it, and lets the error through.

    ``whole`` says whether weights and optimizer are still those of that step: set it false before they change. Random states
    are put back to where the step ended, so that a resume repeats what failed. With several processes something is written
    only at errors that all of them meet: after another's, the others may never come to the barriers of a checkpoint.

    Args:
        save: writes the checkpoint of a step.
        step: the one that training starts after; it is written already, or nothing is there to write.
        common: the errors that all processes meet at once.
    """

    def __init__(self, accelerator, save: Callable[[int], None], step: int, common: type[Exception] | tuple = ()):
        self.accelerator, self._save, self.saved, self.common = accelerator, save, step, common
        self.finished(step)

    def finished(self, step: int) -> None:
        """A step is done."""
        self.step, self.whole = step, True
        self.random = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def save(self, step: int) -> None:
        """The checkpoint that is due anyway."""
        self._save(step)
        self.saved = step

    def __enter__(self) -> Rescue:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if not isinstance(error, Exception) or not self.whole or self.step == self.saved:
            return
        if self.accelerator.num_processes > 1 and not isinstance(error, self.common):
            return
        torch.set_rng_state(self.random[0])
        if self.random[1] is not None:
            torch.cuda.set_rng_state(self.random[1])
        try:
            self.save(self.step)
        except Exception as another:  # the first error is the one to tell
            self.accelerator.print(f"\nstep {self.step} could not be saved: {another}")
        else:
            self.accelerator.print(f"\nSaved step {self.step} before stopping on an error.")


class Skipped:
    """Optimizer steps that were left out because a gradient wasn't finite, with the images that were in them.

    Args:
        most: consecutive steps that may be left out; one more and :meth:`note` says to stop.
    """

    def __init__(self, most: int):
        self.most, self.steps, self.in_a_row = most, 0, 0
        self.images: Counter[str] = Counter()

    def note(self, images: list[str]) -> bool:
        """One more step left out; ``images`` are those whose own loss wasn't finite. Returns whether that is too many."""
        self.steps, self.in_a_row = self.steps + 1, self.in_a_row + 1
        self.images.update(images)
        return self.in_a_row > self.most

    def passed(self) -> None:
        """A step that was taken."""
        self.in_a_row = 0

    def state_dict(self) -> dict:
        """For a checkpoint's record."""
        return {"steps": self.steps, "in_a_row": self.in_a_row, "images": dict(self.images)}

    def load_state_dict(self, state: dict) -> None:
        self.steps, self.in_a_row, self.images = state["steps"], state["in_a_row"], Counter(state["images"])

    def __str__(self) -> str:
        worst = ", ".join(f"{name} ({count})" for name, count in self.images.most_common(10))
        return f"{self.steps} step(s) left out, their gradients weren't finite" + (f"; images: {worst}" if worst else "")


def overflowed(scaler, broken: bool) -> bool:
    """Whether gradients that aren't finite are the affair of float16's gradient scaler, which leaves the step out and lowers
    its scale: the losses are finite (not ``broken``), and its scale is one that can be too high."""
    return scaler is not None and not broken and scaler.get_scale() > 1


def not_finite(seen: list[tuple[list[str], torch.Tensor | None]]) -> list[str]:
    """Of (images, their losses (n,)) the images whose loss isn't finite."""
    bad = []
    for images, losses in seen:
        if losses is not None:
            bad += [image for image, ok in zip(images, torch.isfinite(losses.detach()).tolist(), strict=False) if not ok]
    return bad
