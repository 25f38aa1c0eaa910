"""A LoRA trained with differential privacy (DP-SGD), to compare with: what one would take instead of noisy latents.

    python -m benchmarks.dp_lora --pretrained_model_name_or_path miniature/pipeline --latents_dir CLEAN --output_dir OUT \
        --learning_rate 1e-3 --max_train_steps 300 --batch_size 64 --epsilon 10

CLEAN is a store of clean latents (``python -m sdxl_ambient.latents --t_n none``). A few weights on a public model are
trained with plain denoising score matching, as DP-LDM does (arXiv 2406.01355), by the algorithm of Abadi et al. (arXiv
1607.00133): a step draws each image with probability q = batch_size/n (Poisson subsampling), clips each image's own
gradient to norm C, adds N(0, (noise_multiplier · C)²) to their sum, divides by batch_size, and hands that to Adam. An
image's gradient is the mean over ``noise_multiplicities`` draws of (t, ξ), taken before it is clipped (arXiv 2210.09929):
better gradients, the same privacy. OUT gets an adapter like any other of this project.

What is promised: (ε, δ)-differential privacy of the adapter's weights, by opacus's accountant.

- The unit is one image with its captions, added or removed. The number of images, the options, the base model and its text
  encoders are taken to be public. Pictures that show the same thing are as many units.
- δ is 1/(10 n) unless given. At δ = 1/n, giving away one image in every run would count as private. A tenth of that is the
  most that can be called small, and it favours this method: any smaller δ takes more noise.
- It is for a study, and no guarantee in production: what is drawn follows from ``seed``, so that a run can be repeated, and
  whoever knows the seed can subtract the noise. No artefact has it. opacus's secure_mode, against attacks on floating-point
  noise, is off.
- Of the private data nothing else is told. There is no training loss on the screen, and no hash of the data in the adapter.
  dp_lora.json beside it has the cost, in which the sizes of the batches show, and is not for sharing.

Needs the package opacus. Runs on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sdxl_ambient.config.parser import build_options, option, parse_options
from sdxl_ambient.config.shared import check_writable
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.errors import ModelError, OptionError, StoreError
from sdxl_ambient.formats.peft import save_lora
from sdxl_ambient.formats.record import LORA_FILE
from sdxl_ambient.levels import CLEAN
from sdxl_ambient.models.denoiser import Denoiser
from sdxl_ambient.models.load import load_schedule, load_unet
from sdxl_ambient.models.lora import add_lora
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.objective import ambient_loss
from sdxl_ambient.provenance import write_json
from sdxl_ambient.randomness import Randomness, sample_generator
from sdxl_ambient.store.batches import Batch, collate
from sdxl_ambient.store.checks import check_stores, format_store_levels, levels_of
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.training.record import training_info

RECORD_FILE = "dp_lora.json"
MAXIMUM_PRV = 100.0  # above it opacus's PRV accountant overflows, and its search for the noise never ends
_REQUIRED = ("pretrained_model_name_or_path", "latents_dir", "output_dir")
_REQUIRED_NUMBERS = ("learning_rate", "max_train_steps", "batch_size", "epsilon")


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
    seed: int = option(0, "everything that is drawn follows from it", minimum=0)
    threads: int | None = option(None, "of this process [default: torch's choice]", minimum=1)

    def validate(self) -> None:
        for name in (*_REQUIRED, *_REQUIRED_NUMBERS):
            if not getattr(self, name):
                what = "a number" if name in _REQUIRED_NUMBERS else "a folder or a name"
                raise OptionError(f"--{name}: a value is required, {what}")
        if self.accountant == "prv" and self.epsilon > MAXIMUM_PRV:
            raise OptionError(
                f"--epsilon: {self.epsilon} overflows prv; allowed is up to {MAXIMUM_PRV}, or --accountant rdp"
            )
        if self.delta is not None and self.delta >= 1:
            raise OptionError(f"--delta: {self.delta} is a probability; allowed is below 1, and sensible far below 1/n")
        check_writable("output_dir", self.output_dir)


def check_opacus() -> None:
    """Raises OptionError where opacus, which is optional, is not there."""
    try:
        import opacus  # noqa: F401
    except ImportError as error:
        why = " ".join(str(error).split())
        raise OptionError(f"DP-SGD needs the package opacus (pip install opacus==1.6.0): {why}") from None


# -- the budget ----------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What is spent: (ε, δ) over ``steps`` steps that draw each of ``images`` images with probability ``sample_rate``."""

    epsilon: float
    delta: float
    steps: int
    images: int
    batch_size: int
    accountant: str = "prv"

    @classmethod
    def of(cls, options: DpLoraOptions, images: int) -> Budget:
        """The options' budget; an OptionError where a batch is larger than the store."""
        if options.batch_size > images:
            raise OptionError(
                f"--batch_size: {options.batch_size} is more than the {images} images of {options.latents_dir}"
            )
        delta = 1 / (10 * images) if options.delta is None else options.delta
        return cls(options.epsilon, delta, options.max_train_steps, images, options.batch_size, options.accountant)

    @property
    def sample_rate(self) -> float:
        return self.batch_size / self.images

    @property
    def tolerance(self) -> float:
        """Of ε: 0.01, as opacus has it, but a thousandth of a large ε, since PRV's time and memory go with ε/error."""
        return max(0.01, self.epsilon / 1000)

    @property
    def error(self) -> dict:
        """What the accountant is told of its precision."""
        return {} if self.accountant == "rdp" else {"eps_error": self.tolerance}

    def spent(self, noise_multiplier: float, steps: int) -> float:
        """ε after so many steps."""
        from opacus.accountants import create_accountant

        accountant = create_accountant(mechanism=self.accountant)
        accountant.history = [(noise_multiplier, self.sample_rate, steps)]
        with _accounting():
            return float(accountant.get_epsilon(delta=self.delta, **self.error))


@functools.cache  # a search of seconds, the same for every seed
def noise_multiplier_of(budget: Budget) -> float:
    """The noise's standard deviation in units of C that spends ε, or a little less.

    Raises:
        OptionError: an ε that no noise is enough for.
    """
    from opacus.accountants.utils import get_noise_multiplier

    settings = dict(sample_rate=budget.sample_rate, steps=budget.steps, accountant=budget.accountant)
    target = dict(target_epsilon=budget.epsilon, target_delta=budget.delta, epsilon_tolerance=budget.tolerance)
    try:
        with _accounting():
            return float(get_noise_multiplier(**target, **settings, **budget.error))
    except ValueError as error:
        raise OptionError(f"--epsilon: {budget.epsilon} can't be had with delta = {budget.delta:.3g}: {error}") from None


@contextlib.contextmanager
def _accounting():
    """Without the accountants' remarks: log(0) where q = 1, which they handle, and orders of RDP that could be finer."""
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.filterwarnings("ignore", "Optimal order is")
        yield


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


def take_gradients(losses: torch.Tensor, draws: int, parameters: Sequence[torch.nn.Parameter]) -> None:
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
    """Train an adapter with differential privacy on a store of clean latents, and save it. See the module for what it means.

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
    folders = dict(zip(_REQUIRED, (str(base), str(latents_dir), str(output_dir)), strict=True))
    options = build_options(DpLoraOptions, {**folders, **settings}, "train_dp_lora")
    check_opacus()
    if options.threads:
        torch.set_num_threads(options.threads)
    schedule = load_schedule(options.pretrained_model_name_or_path)
    store = open_clean(options.latents_dir, schedule)
    budget = Budget.of(options, len(store))
    multiplier = noise_multiplier_of(budget)
    unet = load_unet(options.pretrained_model_name_or_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)  # where the LoRA starts
        add_lora(unet, rank=options.rank, alpha=options.rank, targets=options.targets)
        cost = run(unet.train(), schedule, store, budget, multiplier, options)
    promise = {
        "epsilon": budget.spent(multiplier, budget.steps),
        "delta": budget.delta,
        "noise_multiplier": multiplier,
        "max_grad_norm": options.max_grad_norm,
        "sample_rate": budget.sample_rate,
        "steps": budget.steps,
        "images": budget.images,
        "accountant": budget.accountant,
        "unit": "one image with its captions",
    }
    save_lora(unet, options.output_dir, adapter_info(options, store, schedule, promise))
    names = ("rank", "targets", "learning_rate", "batch_size", "noise_multiplicities")
    record = {**promise, "target_epsilon": options.epsilon, **{n: getattr(options, n) for n in names}, **cost}
    write_json(Path(options.output_dir) / RECORD_FILE, record)
    return record


def open_clean(folder: str, schedule: NoiseSchedule) -> LatentStore:
    """The store; a StoreError where it isn't clean, or of another schedule."""
    store = LatentStore(folder)
    if levels_of(store) != [CLEAN]:
        raise StoreError(
            f"{folder} holds latents at t_n = {format_store_levels(store)}; DP-SGD is compared on clean ones, t_n none"
        )
    check_stores(store, None, schedule)
    return store


def adapter_info(options: DpLoraOptions, store: LatentStore, schedule: NoiseSchedule, promise: dict) -> dict:
    """What is recorded with the weights: that of any run, and what it promises. Not the data's hash, which one image's
    being there or not decides, and not the seed, which gives the noise away."""
    told = TrainOptions(pretrained_model_name_or_path=options.pretrained_model_name_or_path)
    info = training_info(told, store, schedule, options.max_train_steps)
    return {**{name: value for name, value in info.items() if name != "data"}, "differential_privacy": promise}


def run(unet, schedule, store, budget: Budget, noise_multiplier: float, options: DpLoraOptions) -> dict:
    """Train the UNet's LoRA in place. Returns what it cost."""
    module, optimizer = private(unet, budget.batch_size, noise_multiplier, options)
    count = max(1, options.micro_batch_size // options.noise_multiplicities)

    def losses_of(items: Sequence[tuple[int, int]]) -> torch.Tensor:
        batch = collate([store[item] for item in items])
        return denoising_losses(module, schedule, batch, options.noise_multiplicities, options.seed)

    seen, empty, started, wall = 0, 0, time.process_time(), time.perf_counter()
    for drawn in tqdm(drawn_steps(budget, options.seed), total=budget.steps, desc="training privately", mininterval=1):
        lists = [[(drawn.start + i, i) for i in part] for part in parts(store, drawn.images, count)]
        private_step(module, optimizer, lists, losses_of, options.noise_multiplicities)
        seen, empty = seen + len(drawn.images), empty + (not drawn.images)
    cost = {"cpu_seconds": time.process_time() - started, "wall_seconds": time.perf_counter() - wall}
    module.to_standard_module()  # takes opacus's hooks off the UNet
    return {"empty_steps": empty, "evaluations": seen * options.noise_multiplicities, **cost}


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


def private(unet, batch_size: int, noise_multiplier: float, options: DpLoraOptions):
    """opacus's GradSampleModule around the UNet, and its DPOptimizer around Adam on the LoRA."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    adam = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], lr=options.learning_rate)
    optimizer = DPOptimizer(
        adam,
        noise_multiplier=noise_multiplier,
        max_grad_norm=options.max_grad_norm,
        expected_batch_size=batch_size,  # not the step's own size, which is private
        generator=sample_generator(options.seed, "private noise", 0),
    )
    return GradSampleModule(unet, loss_reduction="sum"), optimizer


def main(argv: list[str] | None = None) -> int:
    options = parse_options(DpLoraOptions, argv, prog="benchmarks.dp_lora", description=__doc__)
    settings = {name: value for name, value in vars(options).items() if name not in _REQUIRED}
    try:
        if (Path(options.output_dir) / LORA_FILE).exists():
            raise OptionError(f"--output_dir: {options.output_dir!r} holds an adapter already; allowed is another folder")
        record = train_dp_lora(*(getattr(options, name) for name in _REQUIRED), **settings)
    except (OptionError, StoreError, ModelError, OSError) as error:
        print(f"benchmarks.dp_lora: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(record, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
