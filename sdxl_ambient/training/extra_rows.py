"""Rows that follow the noisy ones in a forward pass: what ``--low_noise`` trains at t ≤ t_n."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from sdxl_ambient.models.denoiser import Conditioning
from sdxl_ambient.objective import ExtraRows
from sdxl_ambient.store.batches import Batch


@dataclass
class ExtraBatch:
    """Extra rows (m, …) of one forward pass, and what they need beside.

    conditioning: what the UNet is shown with them. generators: one per row, which go on where drawing the rows stopped.
    contents: hashes that name their pictures.
    replace: whether they take the place of the noisy rows, which are then left out.
    """

    rows: ExtraRows
    conditioning: Conditioning
    generators: list[torch.Generator]
    contents: list[str]
    replace: bool = False


class ExtraSource(Protocol):
    """Where extra rows come from: samples that the model restores, or clean latents."""

    def batches(self, start: int, stop: int, workers: int = 0) -> Iterator[Batch]:
        """This process's batches of images, from micro-step ``start`` to before ``stop``; the same at every resume."""
        ...

    def rows(self, batch: Batch, step: int) -> ExtraBatch | None:
        """The rows of a batch for a micro-step after ``step`` optimizer steps; None where it has none."""
        ...

    def commit(self) -> None:
        """The optimizer step is done: what it drew is kept."""
        ...

    def save(self, folder: Path) -> None:
        """Write this process's state into a checkpoint's folder."""
        ...

    def load(self, folder: Path) -> None:
        """Read it back."""
        ...
