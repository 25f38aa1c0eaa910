"""A run: what is built once, and what its steps share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim.lr_scheduler import LRScheduler

from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.objective import ObjectiveOptions
from sdxl_ambient.store.batches import Batch, Stream, loader
from sdxl_ambient.store.reader import LatentStore, Presentation
from sdxl_ambient.training.checkpoint import save_checkpoint
from sdxl_ambient.training.distributed import full_state, is_sharded
from sdxl_ambient.training.ema import EMA
from sdxl_ambient.training.extra_rows import ExtraSource
from sdxl_ambient.training.interruption import Skipped
from sdxl_ambient.training.model import TrainableModel
from sdxl_ambient.training.optimizers import evaluated
from sdxl_ambient.training.record import InfoSettings, training_info
from sdxl_ambient.training.validation import Validation


@dataclass
class Data:
    """What is trained on.

    store: of noisy latents.
    heldout: likewise, for the held-out loss; None without.
    schedule: the base model's.
    presentation: how pictures are shown.
    """

    store: LatentStore
    heldout: LatentStore | None
    schedule: NoiseSchedule
    presentation: Presentation


@dataclass(frozen=True)
class RunSettings:
    """How long a run is, what its steps are made of, and when it is saved. Values of the options of these names."""

    output_dir: str
    seed: int
    train_batch_size: int
    gradient_accumulation_steps: int
    max_train_steps: int | None  # None: as many as num_train_epochs has
    num_train_epochs: int
    dataloader_num_workers: int
    max_grad_norm: float
    fused_backward_pass: bool
    use_ema: bool
    consistency_teacher: str
    consistency_every: int
    consistency_start: int
    checkpointing_steps: int
    checkpoints_total_limit: int | None


@dataclass
class Run:
    """Everything that a run's steps share.

    info: what stands with the weights.
    extra: rows that follow the noisy ones, for ``--low_noise restore`` and ``clean``.
    average: averaged weights, where they are exported or draw samples.
    skipped: steps that were left out.
    record: what a resume must agree in.
    applied: values of options that may change on resume, which is then said.
    progress: what a checkpoint says of where the run is.
    """

    settings: RunSettings
    info: InfoSettings
    accelerator: Accelerator
    data: Data
    model: TrainableModel
    optimizer: AcceleratedOptimizer
    lr_scheduler: LRScheduler
    objective: ObjectiveOptions
    extra: ExtraSource | None
    average: EMA | None
    validation: Validation
    skipped: Skipped
    record: dict
    applied: dict = field(default_factory=dict)
    progress: dict = field(default_factory=dict)

    @property
    def output(self) -> Path:
        """The folder for results."""
        return Path(self.settings.output_dir)

    @property
    def samples_per_step(self) -> int:
        """Noisy samples of an optimizer step, over all processes."""
        return samples_per_step(self.settings, self.accelerator)

    @property
    def max_train_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max_train_steps(self.settings, self.accelerator, self.data.store)

    def stream(self, first: int) -> Stream:
        """The order of this process's samples after ``first`` optimizer steps."""
        settings, accelerator, store = self.settings, self.accelerator, self.data.store
        accumulation = settings.gradient_accumulation_steps
        return Stream(
            len(store),
            settings.train_batch_size,
            settings.seed,
            start=first * accumulation,
            stop=max(first, self.max_train_steps) * accumulation,
            rank_and_size=(accelerator.process_index, accelerator.num_processes),
            groups=list(store.groups.values()),
        )

    def batches(self, first: int) -> Iterator[tuple[Batch, Batch | None]]:
        """Each micro-step's noisy samples, and those of the extra rows where there are any."""
        stream, workers = self.stream(first), self.settings.dataloader_num_workers
        extra = self.extra.batches(stream.start, stream.stop, workers) if self.extra else itertools.repeat(None)
        for noisy in loader(self.data.store, stream, workers):
            yield noisy, next(extra)  # as many as there are noisy ones: an end before theirs is an error

    def evaluating(self) -> AbstractContextManager:
        """Within it the weights are those that are exported and validated, which may be averages."""
        if self.settings.use_ema and self.average is not None:
            return self.average.weights()
        return evaluated(self.optimizer)

    def export(self, folder: Path, step: int) -> None:
        """Write the weights as they are now: within :meth:`evaluating`, those that are meant to be used.

        Every process calls it.
        """
        state = full_state(self.accelerator, self.model.wrapped[0])
        if self.accelerator.is_main_process:
            self.model.export(folder, training_info(self.info, self.data.store, self.data.schedule, step), state)

    def save(self, step: int) -> None:
        """Write the checkpoint of a step. Every process calls it."""

        def more(folder: Path) -> None:
            if self.extra:
                self.extra.save(folder)
            if is_sharded(self.accelerator) and self.model.record["finetune"] == "lora":
                self.export(folder, step)

        self.progress.update(step=step, skipped=self.skipped.state_dict(), **self.validation.state_dict())
        info = training_info(self.info, self.data.store, self.data.schedule, step)
        with evaluated(self.optimizer):
            limit = self.settings.checkpoints_total_limit
            save_checkpoint(self.accelerator, self.output, step, self.progress, limit, more, info)


def samples_per_step(settings: RunSettings, accelerator: Accelerator) -> int:
    """Noisy samples of an optimizer step, over all processes."""
    return settings.train_batch_size * accelerator.num_processes * settings.gradient_accumulation_steps


def max_train_steps(settings: RunSettings, accelerator: Accelerator, store: LatentStore) -> int:
    """Optimizer steps of the whole run: as many as are asked for, or those of ``--num_train_epochs``."""
    if settings.max_train_steps:
        return settings.max_train_steps
    return math.ceil(settings.num_train_epochs * len(store) / samples_per_step(settings, accelerator))
