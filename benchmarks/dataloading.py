"""Reading a store: samples per second of the loader against those of training, and what memory it takes over time.

    python -m benchmarks.dataloading [--quick] --json benchmarks/results/dataloading.json

The store is made from the miniature's 117 images for fine-tuning, with tokens, and is read with everything that can be asked
for: pictures mirrored, captions drawn and dropped. One worker reads. Training is the miniature's, a LoRA of rank 16 on
batches of 16: forward pass, backward pass and optimizer step, without reading. Both take turns, and the median counts.

Memory is the resident size of the process and its worker, after the first, the tenth and the hundredth epoch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import resident
from benchmarks.record import ROOT, target, write_record
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.models.base import load_schedule
from sdxl_ambient.models.denoiser import Denoiser
from sdxl_ambient.models.load import load_encoders, load_unet
from sdxl_ambient.models.lora import add_lora
from sdxl_ambient.objective import ObjectiveOptions, ambient_objective
from sdxl_ambient.store.batches import Batch, Stream, loader
from sdxl_ambient.store.build import build_store
from sdxl_ambient.store.reader import LatentStore, Presentation
from sdxl_ambient.store.settings import StoreSettings

MINIATURE = ROOT / "miniature/pipeline"
IMAGES = ROOT / "miniature/data/finetune"
BATCH = 16
EPOCHS = (1, 10, 100)


def build(folder: Path) -> None:
    """In a process of its own, whose models don't count into the memory of reading."""
    encoders, schedule = load_encoders(str(MINIATURE)), load_schedule(str(MINIATURE))
    build_store(IMAGES, folder, encoders, schedule, StoreSettings(Geometry(64), keep_tokens=True))


def batches(store: LatentStore, count: int) -> Iterator[Batch]:
    return iter(loader(store, Stream(len(store), BATCH, seed=0, stop=count), workers=1))


# -- memory ----------------------------------------------------------------------


def memory(store: LatentStore, epochs: tuple[int, ...]) -> dict[str, int]:
    """Resident bytes of this process and its worker after so many epochs."""
    ends = {-(-epoch * len(store) // BATCH): epoch for epoch in epochs}
    found = {}
    # Some batches more than are looked at, so that the worker is still there at the end.
    for number, _ in enumerate(batches(store, max(ends) + 8), start=1):
        if number in ends:
            workers = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
            found[f"resident_bytes_after_{ends[number]}"] = sum(resident("VmRSS", who) for who in ("self", *workers))
    return found


# -- rates ----------------------------------------------------------------------


def loading_rate(store: LatentStore, count: int) -> float:
    """Samples per second of the loader, the worker's start not counted."""
    reading = batches(store, count + 1)
    next(reading)
    start = time.perf_counter()
    read = sum(len(batch.contents) for batch in reading)
    return read / (time.perf_counter() - start)


class Training:
    """The miniature's training step on one batch."""

    def __init__(self, batch: Batch):
        self.batch, self.schedule, self.unet = batch, load_schedule(str(MINIATURE)), load_unet(MINIATURE)
        add_lora(self.unet, rank=16, alpha=16, targets=["attention"])
        self.optimizer = torch.optim.AdamW([p for p in self.unet.train().parameters() if p.requires_grad], lr=1e-4)

    def step(self) -> None:
        b = self.batch
        denoise = Denoiser(self.unet, b.conditioning)
        losses = ambient_objective(denoise, self.schedule, b.x_n, b.t_n, b.generators(0), ObjectiveOptions())
        losses.total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def rate(self, steps: int) -> float:
        """Samples per second."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        return steps * BATCH / (time.perf_counter() - start)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="two rounds of a fifth of the batches, and ten epochs")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    rounds, count, steps, epochs = (2, 60, 2, EPOCHS[:2]) if args.quick else (7, 300, 10, EPOCHS)
    with tempfile.TemporaryDirectory() as folder:
        making = multiprocessing.get_context("spawn").Process(target=build, args=(Path(folder) / "store",))
        making.start()
        making.join()
        if making.exitcode:
            raise RuntimeError("the store can't be made; the reason is above")
        store = LatentStore(
            Path(folder) / "store", presentation=Presentation(random_flip=True, empty_prompts=0.1, zero_empty=False)
        )
        figures: dict[str, Any] = {"images": len(store), "batch_size": BATCH, **memory(store, epochs)}
        training = Training(next(batches(store, 1)))
        training.rate(2)  # warms up
        rates = [(loading_rate(store, count), training.rate(steps)) for _ in range(rounds)]
    for name, values in zip(("loader", "step"), zip(*rates, strict=True), strict=True):
        median, slowest, fastest = statistics.median(values), min(values), max(values)
        figures[f"{name}_samples_per_second"] = {"median": median, "slowest": slowest, "fastest": fastest}
    print(figures, flush=True)
    ratio = figures["loader_samples_per_second"]["median"] / figures["step_samples_per_second"]["median"]
    growth = figures["resident_bytes_after_10"] / figures["resident_bytes_after_1"]
    targets = [target("loader_over_step", ratio, ">=", 20), target("loader_memory_growth", growth, "<=", 1.05)]
    write_record(args.json, "dataloading", figures, targets, started)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
