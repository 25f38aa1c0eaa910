"""What the study compares: ways to fine-tune, the noise levels, sizes and seeds of each, and the order of the work."""

from __future__ import annotations

from dataclasses import dataclass, field

SEEDS = (0, 1, 2)
SIZES = (32, 128, 512)
LEVELS = (100, 300, 500, 800)
STEPS = 300  # for the smallest size; the others get as many passes over each picture
CONTROL_LEVEL = 500  # where clean adapters are handed over to the base model when they are sampled early_stop or hybrid

# What all runs have in common; the trainer's flags.
COMMON = {
    "pretrained_model_name_or_path": "miniature/pipeline",
    "resolution": 64,
    "rank": 16,
    "lora_targets": "all",
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "train_batch_size": 16,
    "max_train_steps": STEPS,
    "report_to": "none",
}
RESTORE = {"low_noise": "restore", "restore_refresh": 2, "restore_steps": 8}


@dataclass(frozen=True)
class Method:
    """A way to fine-tune: what it is, the trainer's ``flags``, the steps at which its weights are looked at, whether it
    takes a noise level, and who trains it: "script", the DP-SGD of :mod:`benchmarks.dp_lora` ("dp"), or nobody ("none").

    ``tuned``: held-out pictures choose which step's weights are kept. Steps are those for the smallest size.
    """

    says: str
    flags: dict = field(default_factory=dict)
    lengths: tuple[int, ...] = (STEPS,)
    noisy: bool = True
    trainer: str = "script"
    tuned: bool = False


# As many rows as the others' 300 steps of 16; the clipping norm is the median norm of a picture's gradient at the start.
PRIVATE = {"rank": 16, "targets": ["all"], "learning_rate": 1e-3, "max_train_steps": 75, "batch_size": 64, "epsilon": 10.0,
           "max_grad_norm": 0.2}  # fmt: skip
CLEAN = {"t_n": "none", "low_noise": "skip"}
# A validation every fifteen steps; three without a lower loss end the run. Its best weights are kept.
STOPPED = {"early_stopping": 3, "validation_steps": 15, "heldout_samples": 64}
METHODS = {
    "base": Method("the base model", noisy=False, trainer="none", lengths=(0,)),
    "clean": Method("plain fine-tuning", CLEAN, lengths=(75, 150, STEPS), noisy=False),
    "clean_rank2": Method("plain, rank 2", {**CLEAN, "rank": 2}, noisy=False),
    "clean_decay": Method("plain, weight decay 1", {**CLEAN, "adam_weight_decay": 1.0}, noisy=False),
    "clean_early": Method("plain, stopped by the held-out loss", {**CLEAN, **STOPPED}, noisy=False, tuned=True),
    "dp_sgd": Method("DP-SGD, ε = 10", PRIVATE, lengths=(PRIVATE["max_train_steps"],), noisy=False, trainer="dp"),
    "skip": Method("ambient, nothing below t_n", {"low_noise": "skip"}),
    "skip_short": Method(
        "ambient, nothing below t_n, 75 steps", {"low_noise": "skip", "max_train_steps": 75}, lengths=(75,)
    ),
    "skip_rank2": Method("ambient, nothing below t_n, rank 2", {"low_noise": "skip", "rank": 2}),
    "skip_dropout": Method("ambient, nothing below t_n, LoRA dropout .3", {"low_noise": "skip", "lora_dropout": 0.3}),
    "skip_near": Method(
        "ambient, nothing below t_n, half of the times close above it", {"low_noise": "skip", "t_sampling": "near"}
    ),
    "skip_early": Method(
        "ambient, nothing below t_n, stopped by the held-out ambient loss", {"low_noise": "skip", **STOPPED}, tuned=True
    ),
    "consistency": Method("ambient, consistency", {"low_noise": "consistency"}),
    "restore_low": Method("ambient, restored samples below", {**RESTORE, "restore_levels": "low"}),
    "restore_all": Method("restored samples at every level", {**RESTORE, "restore_levels": "all"}),
    "restore_base": Method(
        "restored by the base model, every level", {**RESTORE, "restore_levels": "all", "restore_teacher": "base"}
    ),
    "clean_low": Method("ambient, clean latents below", {"low_noise": "clean"}),
}


@dataclass(frozen=True, order=True)
class Cell:
    """One training run and what is measured of it. ``t_n`` is a timestep, None for methods without."""

    method: str
    t_n: int | None
    size: int
    seed: int

    @property
    def name(self) -> str:
        level = "" if self.t_n is None else f"-t{self.t_n}"
        return f"{self.method}{level}-n{self.size}-s{self.seed}"

    @property
    def recipe(self) -> Method:
        return METHODS[self.method]

    @property
    def scale(self) -> int:
        """Steps per step of the smallest size."""
        return self.size // SIZES[0]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.scale * n for n in self.recipe.lengths)

    @property
    def flags(self) -> dict:
        """The trainer's, but for level, seed and folders."""
        flags = self.recipe.flags if self.recipe.trainer == "dp" else {**COMMON, **self.recipe.flags}
        return {**flags, "max_train_steps": self.scale * flags["max_train_steps"]}

    @property
    def sampler_t_n(self) -> int:
        """The level at which early_stop stops and hybrid hands over."""
        return CONTROL_LEVEL if self.t_n is None else self.t_n


def cells(methods, levels, sizes, seeds=SEEDS) -> list[Cell]:
    """One cell per method, level where it takes one, size and seed, the seeds innermost."""
    return [
        Cell(method, t_n, size, seed)
        for size in sizes
        for method in methods
        for t_n in (levels if METHODS[method].noisy else (None,))
        for seed in seeds
    ]


# 32 pictures, where copying is worst, at one level each: what the main claims need.
REDUCED = [
    *cells(("base", "clean"), (), (32,)),
    *cells(("restore_base", "skip", "restore_all", "consistency"), (500,), (32,)),
    *cells(("restore_base",), (800,), (32,)),
    *cells(("clean_rank2", "dp_sgd"), (), (32,)),
]
# Three seeds leave Student's t so wide that the main claim stays undecided.
MORE_SEEDS = cells(("restore_base", "clean", "base", "skip_early", "clean_early"), (800,), (32,), (3, 4, 5))
# What could make the ambient loss alone work with few pictures.
RESCUE = cells(("skip_short", "skip_rank2", "skip_dropout", "skip_near", "skip_early"), (500, 800), (32,))
# Everything, the reduced grid first, then what tells most.
FULL = list(
    dict.fromkeys(
        [
            *REDUCED,
            *MORE_SEEDS,
            *cells(("clean_decay", "clean_early"), (), (32,)),
            *cells(("skip", "consistency"), (100, 800), (32,)),
            *RESCUE,
            *cells(("base", "clean"), (), (128,)),
            *cells(("clean_early", "skip_early", "restore_base"), (800,), (128,)),
            *cells(("skip", "restore_base", "consistency"), (100, 300, 800), (32,)),
            *cells(METHODS, LEVELS, (32,)),
            *cells(METHODS, LEVELS, (128,)),
            *cells(METHODS, LEVELS, (512,)),
        ]
    )
)
GRIDS = {"reduced": REDUCED, "full": FULL}
