"""What is looked at between training steps: held-out loss and denoising gap, images, and whether the weights copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import EulerDiscreteScheduler

from sdxl_ambient.errors import OptionError
from sdxl_ambient.images.captions import Columns
from sdxl_ambient.images.load import list_images
from sdxl_ambient.levels import CLEAN
from sdxl_ambient.models.denoiser import Denoiser
from sdxl_ambient.models.parts import load_part
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.pipeline import euler_like, timestep_grid
from sdxl_ambient.provenance import write_json
from sdxl_ambient.spread import spread
from sdxl_ambient.store.batches import Batch
from sdxl_ambient.store.checks import common_t_n, levels_of
from sdxl_ambient.store.reader import LatentStore, Presentation
from sdxl_ambient.training.heldout_loss import BandSettings, EarlyStopping, Losses, band_edges, band_losses, compare, scalars
from sdxl_ambient.training.model import TrainableModel
from sdxl_ambient.training.samples import SamplerSettings, ValidationSampler, track_images

HELDOUT_FILE, MEMORIZATION_FILE = "heldout_loss.json", "memorization.json"


@dataclass(frozen=True)
class ValidationSettings:
    """What is looked at, how often, and when it ends the run. Names are those of options.

    drawing: how images are drawn, at the level that the options say. prompts: all of them, also those of a file.
    bands: how the held-out loss is taken.
    """

    output_dir: str
    drawing: SamplerSettings
    prompts: list[str]
    num_validation_images: int
    validation_steps: int
    validation_sampler: list[str]
    bands: BandSettings
    heldout_samples: int
    early_stopping: int | None
    max_denoising_gap: float | None
    memorization_every: int | None
    memorization_images: int
    train_data_dir: str | None
    caption_column: str
    caption_encoding: str | None
    instance_prompt: str | None


class Validation:
    """Runs what is due after a step, keeps the records, and says when there has been enough training.

    Args:
        quick: a folder of drawn images → the evaluation's short figures of it; where ``--memorization_every`` asks for them.

    Raises:
        OptionError: a sampler that can't be had at the store's noise level.
    """

    def __init__(
        self,
        settings: ValidationSettings,
        accelerator: Accelerator,
        trainable: TrainableModel,
        schedule: NoiseSchedule,
        store: LatentStore,
        heldout: LatentStore | None,
        quick: Callable[[Path], dict] | None = None,
    ):
        self.settings, self.accelerator, self.schedule, self.quick = settings, accelerator, schedule, quick
        self.output, self.heldout = Path(settings.output_dir), heldout
        self.store = store.presented(Presentation())  # as they are: with captions, not mirrored
        # Handing over, or stopping, at the lowest level of the store leaves no level that training never saw. A store that
        # was given has levels of its own, whatever --t_n says.
        lowest = levels_of(store)[0]
        drawing = replace(settings.drawing, t_n=None if lowest == CLEAN else lowest)
        self.drawing = ValidationSampler(drawing, accelerator, trainable)
        self.samplers = list(dict.fromkeys(self.drawing.sampler(s) for s in settings.validation_sampler))
        self._check_samplers()
        self.trainable = trainable
        self.stopping = EarlyStopping(settings.early_stopping, settings.max_denoising_gap)
        self.memorization: list[dict] = []
        self.start: Losses | None = None  # of the weights that training starts from

    def _check_samplers(self) -> None:
        settings, drawing = self.settings, self.drawing.settings
        level, steps = drawing.t_n, drawing.validation_inference_steps
        samplers = [("validation_sampler", s) for s in self.samplers if settings.prompts]
        samplers += [("memorization_every", self.drawing.sampler("auto"))] if settings.memorization_every else []
        partial = [(flag, name) for flag, name in samplers if name != "full"]
        if not partial:
            return
        flag, name = partial[0]
        if level is None:
            raise OptionError(f"--{flag}: {name!r} needs a noise level; allowed for clean latents is full")
        base, revision = drawing.base.pretrained_model_name_or_path, drawing.base.revision
        scheduler = load_part(EulerDiscreteScheduler, base, "scheduler", subfolder="scheduler", revision=revision)
        first = timestep_grid(euler_like(scheduler), steps)[0]
        if level >= first:
            raise OptionError(
                f"--{flag}: {name!r} begins at timestep {first} in {steps} steps, which is not above t_n = {level}; more "
                f"--validation_inference_steps begin higher{', full always works' if flag == 'validation_sampler' else ''}"
            )

    # -- state ----------------------------------------------------------------------

    @property
    def best(self) -> list | None:
        """Step and held-out loss of the weights in ``best``."""
        best = self.stopping.best
        return None if best is None else [best["step"], best["heldout"]]

    def state_dict(self) -> dict:
        """For a checkpoint's record."""
        start = None
        if self.start is not None and self.heldout is not None:
            losses = {"heldout": self.start.heldout.tolist(), "train": self.start.train.tolist()}
            start = {**losses, "store": self.heldout.hash}
        return {"heldout": self.stopping.records, "memorization": self.memorization, "start": start}

    def load_state_dict(self, progress: dict) -> None:
        # An earlier version kept pairs of step and loss, of other times and noise, which can't be compared with these.
        self.stopping.records = [r for r in progress.get("heldout", []) if isinstance(r, dict)]
        self.memorization = progress.get("memorization", [])
        if (start := progress.get("start")) and self.heldout is not None:
            losses = Losses(*(torch.tensor(start[s], dtype=torch.float64) for s in ("heldout", "train")))
            same = start.get("store", self.heldout.hash) == self.heldout.hash
            self._take_start(losses, same, progress.get("step"))

    def _take_start(self, start: Losses, same: bool, step: int | None) -> None:
        """Losses of other pictures or bands can't be compared with those to come, which then begin anew."""
        self.start = start
        shapes = [(len(pictures), self.settings.bands.bands) for _, pictures in self._pictures()]
        if not same or [tuple(x.shape) for x in (start.heldout, start.train)] != shapes:
            self.start, self.stopping.records = None, []
            self.accelerator.print(
                f"note: --heldout_bands, --heldout_samples or the held-out images are others than before step {step}: the "
                "held-out loss and the denoising gap are counted from here"
            )

    # -- what is due ----------------------------------------------------------------------

    def due(self, step: int, last: bool) -> bool:
        every = self.settings.memorization_every
        return last or step % self.settings.validation_steps == 0 or (every is not None and step % every == 0)

    def run(self, unet, step: int, last: bool, export: Callable[[Path, int], None]) -> str | None:
        """Everything that is due after ``step``. All processes call it. Returns why training should stop, if it should.

        Args:
            unet: as it is trained, in its wrapper. export: writes the current weights into a folder.
        """
        settings, reason = self.settings, None
        if last or step % settings.validation_steps == 0:
            if self.heldout is not None:
                reason = self._losses(unet, step, export)
            if settings.prompts:
                self._images(step)
        if settings.memorization_every and (last or step % settings.memorization_every == 0):
            self._memorization(step)
        self.accelerator.wait_for_everyone()
        return None if last else reason

    def begin(self, unet) -> None:
        """Before the first step: the losses that later ones are compared with. All processes call it."""
        if self.heldout is not None and self.start is None:
            self.start = self._measure(unet)

    def _pictures(self) -> list[tuple[LatentStore, list[int]]]:
        """The held-out and the training pictures that losses are taken of: as many of each, where there are."""
        assert self.heldout is not None
        most = min(self.settings.heldout_samples, len(self.heldout))
        return [(store, spread(range(len(store)), most)) for store in (self.heldout, self.store)]

    def _measure(self, unet) -> Losses:
        bands, accelerator = self.settings.bands, self.accelerator

        def denoiser(batch: Batch) -> Denoiser:
            return Denoiser(unet, self.trainable.conditioning(batch, accelerator.device), self.trainable.dtype)

        return Losses(*(
            band_losses(accelerator, unet, denoiser, self.schedule, store, pictures, bands)
            for store, pictures in self._pictures()
        ))  # fmt: skip

    def _losses(self, unet, step: int, export) -> str | None:
        assert self.start is not None, "begin() has measured it"
        record = compare(step, self._measure(unet), self.start, self._edges())
        lowest = self.stopping.add(record)
        self.accelerator.log(scalars(record), step=step)
        own = record["gap"]
        self.accelerator.print(
            f"\nstep {step}: held-out loss {record['heldout']:.5f}, of as many training images {record['train']:.5f}, "
            f"gap {100 * own['value']:.1f} ± {200 * own['standard_error']:.1f} %"
        )
        if lowest:
            export(self.output / "best", step)
        if self.accelerator.is_main_process:
            write_json(self.output / HELDOUT_FILE, {"losses": self.stopping.records, "best": self.best})
        return self.stopping.reason

    def _edges(self) -> list[tuple[int, int]] | None:
        assert self.heldout is not None
        level = common_t_n(self.heldout)
        if isinstance(level, str) or level != common_t_n(self.store):  # "mixed"
            return None
        return band_edges(self.schedule, CLEAN if level is None else level, self.settings.bands.bands)

    def _images(self, step: int) -> None:
        settings, drawn = self.settings, {}
        for name in self.samplers:
            folder = self.output / "validation" / f"step-{step:06d}" / name
            files = self.drawing.draw(folder, settings.prompts, settings.num_validation_images, name)
            drawn |= {f"{name}: {p}": f for p, f in zip(settings.prompts, files, strict=True)}
        if self.accelerator.is_main_process:
            track_images(self.accelerator, drawn, step)

    def _memorization(self, step: int) -> None:
        """Draw with training captions, and compare: the share of copies and its excess over held-out images."""
        settings = self.settings
        assert settings.train_data_dir is not None, "validated with --memorization_every"
        columns = Columns(settings.caption_column, encoding=settings.caption_encoding)
        records = list_images(settings.train_data_dir, columns)
        captions = [r.captions[0] if r.captions else settings.instance_prompt or "" for r in records]
        prompts = _spread(captions, settings.memorization_images)
        folder = self.output / "memorization" / f"step-{step:06d}"
        self.drawing.draw(folder, prompts, 1, self.drawing.sampler("auto"), purpose="memorization")
        if self.accelerator.is_main_process:
            assert self.quick is not None, "the main process has one"
            figures = {"step": step, **self.quick(folder)}
            self.memorization.append(figures)
            write_json(self.output / MEMORIZATION_FILE, {"looks": self.memorization})
            share, excess = figures["share_above_threshold"], figures["excess_over_heldout"]
            low, high = figures["excess_interval"]
            self.accelerator.print(
                f"\nstep {step}: {share:.3f} of {len(prompts)} images above the threshold, "
                f"excess over held-out {excess:.3f} [{low:.3f}, {high:.3f}]"
            )
            self.accelerator.log({"copied_share": share, "memorized_excess": excess}, step=step)


def _spread(items: list, wanted: int) -> list:
    """``wanted`` of the items, evenly spaced, more than once where there are fewer."""
    return [items[k % len(items)] for k in range(wanted)] if wanted > len(items) else spread(items, wanted)
