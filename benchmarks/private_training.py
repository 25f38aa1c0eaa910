"""Training of a LoRA by DP-SGD: gradients of single images, clipped and summed, with noise. Needs the package opacus.

What is promised, and how it is meant, stands in :mod:`benchmarks.dp_lora`.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.privacy_budget import Budget, check_opacus, noise_multiplier_of
from sdxl_ambient.config.parser import build_options, option
from sdxl_ambient.config.shared import check_writable
from sdxl_ambient.errors import OptionError, StoreError
from sdxl_ambient.formats.peft import save_lora
from sdxl_ambient.levels import CLEAN
from sdxl_ambient.models.base import load_schedule
from sdxl_ambient.models.denoiser import Denoiser
from sdxl_ambient.models.load import load_unet
from sdxl_ambient.models.lora import add_lora
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.objective import ambient_loss
from sdxl_ambient.provenance import write_json
from sdxl_ambient.randomness import Randomness, sample_generator
from sdxl_ambient.store.batches import Batch, collate
from sdxl_ambient.store.checks import check_stores, format_store_levels, levels_of
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.training.record import InfoSettings, training_info

RECORD_FILE = "dp_lora.json"
MAXIMUM_PRV = 100.0  # above it opacus's PRV accountant overflows, and its search for the noise never ends
REQUIRED = ("pretrained_model_name_or_path", "latents_dir", "output_dir")
REQUIRED_NUMBERS = ("learning_rate", "max_train_steps", "batch_size", "epsilon")


@dataclass(frozen=True)
class PrivateSettings:
    """What the loop is told beside the budget; see :class:`DpLoraOptions`."""

    learning_rate: float
    max_grad_norm: float
    noise_multiplicities: int
    micro_batch_size: int
    seed: int


@dataclass
class DpLoraOptions:
    """``python -m benchmarks.dp_lora``."""

    pretrained_model_name_or_path: str | None = option(None, "base model, taken to be public: a directory or a Hub name")
    latents_dir: str | None = option(None, "a store of clean latents")
    output_dir: str | None = option(None, "folder for the adapter")
    rank: int = option(16, "rank of the LoRA, and its alpha", minimum=1)
    targets: list[str] = option(["all"], "modules it goes on, as the training script's --lora_targets")
    learning_rate: float | None = option(None, "Adam's", above=0)
    max_train_steps: int | None = option(None, "optimizer steps", minimum=1)
    batch_size: int | None = option(None, "images in a step, on average", minimum=1)
    epsilon: float | None = option(None, "privacy budget of the whole run", minimum=0.1, maximum=10_000)
    delta: float | None = option(None, "its failure probability [default: 1/(10 n)]", above=0)
    max_grad_norm: float = option(1.0, "norm C that each image's gradient is clipped to", above=0)
    noise_multiplicities: int = option(1, "draws of time and noise that an image's gradient is the mean of", minimum=1)
    accountant: str = option("prv", "prv is tight; rdp also takes an epsilon above 100", choices=("prv", "rdp"))
    micro_batch_size: int = option(32, "rows in a forward pass: memory, and nothing else", minimum=1)
    seed: int = option(0, "everything that is drawn follows from it", minimum=0, maximum=2**32 - 1)
    threads: int | None = option(None, "of this process [default: torch's choice]", minimum=1)

    def validate(self) -> None:
        for name in (*REQUIRED, *REQUIRED_NUMBERS):
            if not getattr(self, name):
                what = "a number" if name in REQUIRED_NUMBERS else "a folder or a name"
                raise OptionError(f"--{name}: a value is required, {what}")
        assert self.epsilon and self.output_dir
        if self.accountant == "prv" and self.epsilon > MAXIMUM_PRV:
            raise OptionError(
                f"--epsilon: {self.epsilon} overflows prv; allowed is up to {MAXIMUM_PRV}, or --accountant rdp"
            )
        if self.delta is not None and self.delta >= 1:
            raise OptionError(f"--delta: {self.delta} is a probability; allowed is below 1, and sensible far below 1/n")
        check_writable("output_dir", self.output_dir)

    def settings(self) -> PrivateSettings:
        """Those of the loop, once :meth:`validate` has found all that is required."""
        names = [f.name for f in dataclasses.fields(PrivateSettings)]
        return PrivateSettings(**{name: getattr(self, name) for name in names})


def budget_of(
    store: LatentStore, epsilon: float, delta: float | None, steps: int, batch_size: int, accountant: str
) -> Budget:
    """The budget for a store; an OptionError where a batch is larger than it."""
    images = len(store)
    if batch_size > images:
        raise OptionError(f"--batch_size: {batch_size} is more than the {images} images of {store.folder}")
    return Budget(epsilon, 1 / (10 * images) if delta is None else delta, steps, images, batch_size, accountant)


# -- gradients of single images ----------------------------------------------------------------------


def draw_images(images: int, sample_rate: float, generator: torch.Generator) -> list[int]:
    """Indices of the images of one step: each with probability ``sample_rate``, whatever the others do; perhaps none."""
    return torch.nonzero(torch.rand(images, generator=generator, dtype=torch.float64) < sample_rate).flatten().tolist()


def parts(store: LatentStore, drawn: Sequence[int], size: int) -> list[list[int]]:
    """The images of a step in lists of at most ``size`` of equal height and width; one empty list for no images."""
    chosen = set(drawn)
    groups = [[i for i in group if i in chosen] for group in store.groups.values()]
    return [group[k : k + size] for group in groups for k in range(0, len(group), size)] or [[]]


def denoising_losses(unet, schedule: NoiseSchedule, batch: Batch, draws: int, seed: int) -> torch.Tensor:
    """Plain denoising losses, (images · draws,), an image's draws one after the other; from seed and position."""
    rows = torch.arange(len(batch.positions)).repeat_interleave(draws)
    generators = [sample_generator(seed, f"private draw {k}", p) for p in batch.positions for k in range(draws)]
    x_0, t_n, randomness = batch.x_n[rows], batch.t_n[rows], Randomness(generators, len(rows))
    t = schedule.draw_times(t_n, randomness.uniform())
    return ambient_loss(
        Denoiser(unet, batch.conditioning.rows(rows)), schedule, x_0, t_n, t, randomness.normal(x_0), loss_space="epsilon"
    )


def take_gradients(losses: torch.Tensor, draws: int, parameters: Sequence) -> None:
    """Each image's gradient, of the mean of its draws' losses, to every parameter's ``grad_sample`` (images, …).

    The network is in opacus's GradSampleModule, which keeps what goes into every layer of the LoRA and the gradient of what
    comes out: for these layers the batch is the first dimension, so an image's gradient is the product of its own rows.
    """
    with warnings.catch_warnings():
        # What goes into the first layers and the captions' projections needs no gradient; their weights have theirs.
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        (losses.sum() / draws).backward()
    if draws > 1:
        for p in parameters:
            p.grad_sample = p.grad_sample.unflatten(0, (-1, draws)).sum(1)


def private_step(module, optimizer, lists: Sequence[Sequence[tuple[int, int]]], losses_of, draws: int) -> None:
    """One step of DP-SGD over lists of (position, index): every image is clipped, the noise is added once.

    Args:
        module: the GradSampleModule. optimizer: opacus's DPOptimizer on it. lists: see :func:`parts`; a step without images
            is one of noise alone, which the accountant counts on.
        losses_of: a list → its losses (images · draws,).
    """
    for number, items in enumerate(lists, start=1):
        optimizer.zero_grad()
        if items:
            take_gradients(losses_of(items), draws, optimizer.params)
        else:
            for p in optimizer.params:
                p.grad_sample = p.new_zeros(0, *p.shape)
        optimizer.signal_skip_step(number < len(lists))  # until the last it clips and adds up
        optimizer.step()


# -- training ----------------------------------------------------------------------


def train_dp_lora(base: str | Path, latents_dir: str | Path, output_dir: str | Path, **settings) -> dict:
    """Train an adapter with differential privacy on a store of clean latents, and save it.

    :mod:`benchmarks.dp_lora` says what is promised.

    Args:
        base: the base model, public. latents_dir: a store of clean latents.
        settings: those of :class:`DpLoraOptions`; learning_rate, max_train_steps, batch_size and epsilon are required.

    Returns:
        The record, which is also written to dp_lora.json: ``epsilon`` spent, ``delta``, ``noise_multiplier``,
        ``sample_rate``, ``steps``, ``images``, ``accountant``, the settings, ``empty_steps``, ``evaluations`` of the network
        (rows that went forward and backward), ``cpu_seconds`` of this process and ``wall_seconds``, both of the training
        loop alone.

    Raises:
        OptionError: a setting out of its range, or no opacus. StoreError, ModelError: inputs that don't fit.
    """
    folders = dict(zip(REQUIRED, (str(base), str(latents_dir), str(output_dir)), strict=True))
    options = build_options(DpLoraOptions, {**folders, **settings}, "train_dp_lora")
    check_opacus()
    if options.threads:
        torch.set_num_threads(options.threads)
    schedule = load_schedule(str(base))
    store = open_clean(str(latents_dir), schedule)
    assert options.epsilon and options.max_train_steps and options.batch_size  # validate() has asked for them
    budget = budget_of(
        store, options.epsilon, options.delta, options.max_train_steps, options.batch_size, options.accountant
    )
    multiplier = noise_multiplier_of(budget)
    unet = load_unet(str(base))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)  # where the LoRA starts
        add_lora(unet, rank=options.rank, alpha=options.rank, targets=options.targets)
        cost = run(unet.train(), schedule, store, budget, multiplier, options.settings())
    promise = promised(budget, multiplier, options.max_grad_norm)
    save_lora(unet, str(output_dir), adapter_info(str(base), store, schedule, budget.steps, promise))
    names = ("rank", "targets", "learning_rate", "batch_size", "noise_multiplicities")
    record = {**promise, "target_epsilon": options.epsilon, **{n: getattr(options, n) for n in names}, **cost}
    write_json(Path(output_dir) / RECORD_FILE, record)
    return record


def promised(budget: Budget, noise_multiplier: float, max_grad_norm: float) -> dict:
    """What is recorded of the privacy, with the weights and with the costs."""
    return {
        "epsilon": budget.spent(noise_multiplier, budget.steps),
        "delta": budget.delta,
        "noise_multiplier": noise_multiplier,
        "max_grad_norm": max_grad_norm,
        "sample_rate": budget.sample_rate,
        "steps": budget.steps,
        "images": budget.images,
        "accountant": budget.accountant,
        "unit": "one image with its captions",
    }


def open_clean(folder: str, schedule: NoiseSchedule) -> LatentStore:
    """The store; a StoreError where it isn't clean, or of another schedule."""
    store = LatentStore(folder)
    if levels_of(store) != [CLEAN]:
        raise StoreError(
            f"{folder} holds latents at t_n = {format_store_levels(store)}; DP-SGD is compared on clean ones, t_n none"
        )
    check_stores(store, None, schedule)
    return store


def adapter_info(base: str, store: LatentStore, schedule: NoiseSchedule, steps: int, promise: dict) -> dict:
    """What is recorded with the weights: that of any run, and what it promises. Not the data's hash, which one image's
    being there or not decides, and not the seed, which gives the noise away."""
    settings = InfoSettings(base, low_noise="skip", loss_space="epsilon", finetune="lora", lora=None, resolution=1024)
    info = training_info(settings, store, schedule, steps)
    return {**{name: value for name, value in info.items() if name != "data"}, "differential_privacy": promise}


def run(unet, schedule, store, budget: Budget, noise_multiplier: float, settings: PrivateSettings) -> dict:
    """Train the UNet's LoRA in place. Returns what it cost."""
    module, optimizer = private(unet, budget.batch_size, noise_multiplier, settings)
    count = max(1, settings.micro_batch_size // settings.noise_multiplicities)

    def losses_of(items: Sequence[tuple[int, int]]) -> torch.Tensor:
        batch = collate([store[item] for item in items])
        return denoising_losses(module, schedule, batch, settings.noise_multiplicities, settings.seed)

    seen, empty, started, wall = 0, 0, time.process_time(), time.perf_counter()
    for drawn in tqdm(drawn_steps(budget, settings.seed), total=budget.steps, desc="training privately", mininterval=1):
        lists = [[(drawn.start + i, i) for i in part] for part in parts(store, drawn.images, count)]
        private_step(module, optimizer, lists, losses_of, settings.noise_multiplicities)
        seen, empty = seen + len(drawn.images), empty + (not drawn.images)
    cost = {"cpu_seconds": time.process_time() - started, "wall_seconds": time.perf_counter() - wall}
    module.to_standard_module()  # takes opacus's hooks off the UNet
    return {"empty_steps": empty, "evaluations": seen * settings.noise_multiplicities, **cost}


@dataclass(frozen=True)
class Drawn:
    """The images of a step; image i is shown at position ``start`` + i of the run."""

    start: int
    images: list[int]


def drawn_steps(budget: Budget, seed: int) -> Iterator[Drawn]:
    """The images of every step of a run."""
    generator = sample_generator(seed, "private order", 0)
    for step in range(budget.steps):
        yield Drawn(step * budget.images, draw_images(budget.images, budget.sample_rate, generator))


def private(unet, batch_size: int, noise_multiplier: float, settings: PrivateSettings):
    """opacus's GradSampleModule around the UNet, and its DPOptimizer around Adam on the LoRA."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    adam = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], lr=settings.learning_rate)
    optimizer = DPOptimizer(
        adam,
        noise_multiplier=noise_multiplier,
        max_grad_norm=settings.max_grad_norm,
        expected_batch_size=batch_size,  # not the step's own size, which is private
        generator=sample_generator(settings.seed, "private noise", 0),
    )
    return GradSampleModule(unet, loss_reduction="sum"), optimizer
