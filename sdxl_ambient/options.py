"""Every option of encoding and training, with its type, default, range and help. Names are the diffusers examples'."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sdxl_ambient.config import OptionError, option

MAXIMUM_T_N = 998  # one level above it must be left to train on


@dataclass
class ModelOptions:
    """Which base model."""

    pretrained_model_name_or_path: str | None = option(
        None, "base model: a local directory in diffusers format, or a name on the Hub"
    )
    pretrained_vae_model_name_or_path: str | None = option(None, "another VAE than the base model's own")
    revision: str | None = option(None, "branch, tag or commit of the base model on the Hub")
    variant: str | None = option(None, "variant of the weight files, such as fp16")

    def validate(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise OptionError("--pretrained_model_name_or_path: a value is required, a directory or a Hub name")


@dataclass
class DataOptions(ModelOptions):
    """Which images, and how they become noisy latents."""

    train_data_dir: str | None = option(None, "folder of images, with captions in metadata.jsonl or .txt files")
    caption_column: str = option("text", "the column of metadata.jsonl that holds the captions")
    instance_prompt: str | None = option(None, "caption for images that have none; without it they are skipped")
    resolution: int = option(1024, "side of the square that images are resized and cropped to, pixels", minimum=16)
    center_crop: bool = option(True, "crop the middle; if false, a place drawn once per image")
    t_n: int | None = option(
        500,
        "noise level of the stored latents, a timestep; none = clean latents (nothing is protected)",
        minimum=0,
        maximum=MAXIMUM_T_N,
    )
    noise_key_file: str | None = option(
        None,
        "file with the key that the noise is made from, for a rebuild with the same noise; created with mode 600 if "
        "missing. By default the key is random and never written. Whoever has it can remove the noise",
    )
    allow_second_observation: bool = option(
        False, "draw new noise for images that a noisy store already holds; two draws can be averaged"
    )
    shard_size: int = option(256, "images or captions per stored file", minimum=1)

    def of_a_store(self) -> dict:
        """What :func:`sdxl_ambient.latents.build_store` is told, by its names."""
        names = ("t_n", "caption_column", "instance_prompt", "noise_key_file", "allow_second_observation", "shard_size")
        return {name: getattr(self, name) for name in names}

    def validate_data(self) -> None:
        if self.train_data_dir is not None and not Path(self.train_data_dir).is_dir():
            raise OptionError(f"--train_data_dir: {self.train_data_dir!r} is not a folder")

    def validate_key(self, *artefacts: str | None) -> None:
        if self.noise_key_file is None:
            return
        key = Path(self.noise_key_file).resolve()
        for folder in filter(None, artefacts):
            if key.is_relative_to(Path(folder).resolve()):
                raise OptionError(
                    f"--noise_key_file: {self.noise_key_file!r} lies inside {folder!r}, which is made to be shared; "
                    "keep the key elsewhere"
                )


@dataclass
class LatentsOptions(DataOptions):
    """``python -m sdxl_ambient.latents``."""

    output_dir: str | None = option(None, "folder for the store")

    def validate(self) -> None:
        super().validate()
        if not self.train_data_dir:
            raise OptionError("--train_data_dir: a value is required, a folder of images")
        self.validate_data()
        if not self.output_dir:
            raise OptionError("--output_dir: a value is required, a folder for the store")
        check_writable("output_dir", self.output_dir)
        self.validate_key(self.output_dir, self.train_data_dir)


@dataclass
class TrainOptions(DataOptions):
    """``accelerate launch train_sdxl_ambient.py``."""

    latents_dir: str | None = option(
        None, "store of noisy latents; made from --train_data_dir if missing [default: OUTPUT_DIR/latents]"
    )
    heldout_data_dir: str | None = option(None, "folder of images kept out of training, for the held-out loss")
    heldout_latents_dir: str | None = option(None, "their store [default: OUTPUT_DIR/latents_heldout]")
    output_dir: str | None = option(None, "folder for the results")

    finetune: str = option("lora", "what is trained", choices=("lora", "full"))
    rank: int = option(16, "rank of the LoRA", minimum=1)
    lora_alpha: float | None = option(None, "scale of the LoRA is alpha/rank [default: the rank]", above=0)
    lora_dropout: float = option(0.0, "dropout in front of the LoRA", minimum=0, maximum=0.99)
    lora_targets: list[str] = option(["attention"], "presets attention, linear, all, or endings of module names")
    use_dora: bool = option(False, "weight-decomposed LoRA (DoRA)")

    low_noise: str = option(
        "skip",
        "what is done at t <= t_n: skip leaves those levels to the base model, consistency trains them to agree with the "
        "levels above, restore trains them on samples that the model draws given the noisy latents",
        choices=("skip", "consistency", "restore"),
    )
    loss_space: str = option("epsilon", "space of the loss", choices=("epsilon", "x_n"))
    snr_gamma: float | None = option(None, "min-SNR-γ weighting of the loss, usually 5.0 [default: none]", above=0)
    debiased_estimation_loss: bool = option(False, "debiased weighting of the loss, 1/sqrt(SNR)")
    balance_cap: float | None = option(
        None,
        "weigh levels just above t_n like the others, as far as this factor; usually 25, with --antithetic [default: none]",
        minimum=1,
    )
    antithetic: bool = option(
        False, "every sample twice in a forward pass, with opposite noise: twice its cost, less noise in the gradient"
    )
    t_sampling: str = option(
        "uniform", "how times above t_n are drawn; near draws half of them close above it", choices=("uniform", "near")
    )
    consistency_weight: float | None = option(
        None, "weight of the consistency loss [default: 2 with --low_noise consistency, else 0]", minimum=0
    )
    consistency_anchor: str = option(
        "chain",
        "where pairs start: at the ambient loss's own x_t (its forward pass is reused), at the noisy latent, or below t_n, "
        "where a chain from the noisy latent ends",
        choices=("ambient", "boundary", "chain"),
    )
    consistency_steps: int = option(4, "reverse steps of that chain", minimum=1)
    consistency_max_step: int = option(100, "largest step between the times of a pair, timesteps", minimum=1)
    consistency_space: str = option("snr", "space of the consistency loss", choices=("x_0", "snr"))
    consistency_estimator: str = option(
        "single", "branches of the consistency loss that have a graph; the gradient's mean is the same",
        choices=("single", "both"),
    )  # fmt: skip
    consistency_stop_anchor: bool = option(True, "hold the earlier time's prediction fixed")
    consistency_teacher: str = option("none", "weights that reverse steps are drawn with", choices=("none", "ema"))
    consistency_batch: int | None = option(None, "samples of a batch that get that loss [default: all]", minimum=1)
    consistency_every: int = option(1, "optimizer steps from one consistency loss to the next", minimum=1)
    consistency_start: int = option(0, "optimizer steps with the ambient loss alone before the first of them", minimum=0)
    restore_levels: str = option(
        "low",
        "levels that restored samples train: those at or below t_n, beside the ambient loss, or all, in its place",
        choices=("low", "all"),
    )
    restore_teacher: str = option(
        "ema",
        "weights that draw restored samples: the averaged ones (expectation-maximisation, round after round), or those that "
        "training starts from (its first round, which copies less and cannot drift)",
        choices=("ema", "base"),
    )
    restore_batch_size: int | None = option(
        None, "restored samples in a forward pass [default: half of --train_batch_size; all of it for all levels]", minimum=1
    )
    restore_refresh: int | None = option(
        None, "of those, how many are drawn anew in each [default: a quarter of them]", minimum=0
    )
    restore_steps: int = option(10, "evaluations of the chain that draws one", minimum=1)
    restore_start: int = option(0, "optimizer steps with the ambient loss alone before samples are restored", minimum=0)
    restore_weight: float = option(1.0, "weight of the loss on restored samples", above=0)
    ema_decay: float = option(0.995, "decay of the averaged weights that restore and teach", minimum=0, maximum=0.999999)

    seed: int = option(0, "seed of everything that is drawn, except the noise of the latents", minimum=0)
    train_batch_size: int = option(16, "samples per process and forward pass", minimum=1)
    num_train_epochs: int = option(100, "passes over the data, where --max_train_steps is not given", minimum=1)
    max_train_steps: int | None = option(None, "optimizer steps", minimum=1)
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step", minimum=1)
    gradient_checkpointing: bool = option(False, "recompute activations: slower, less memory")
    learning_rate: float = option(1e-4, "peak learning rate", above=0)
    scale_lr: bool = option(False, "multiply it by processes × accumulation × batch size")
    lr_scheduler: str = option(
        "constant",
        "course of the learning rate",
        choices=(
            "linear",
            "cosine",
            "cosine_with_restarts",
            "polynomial",
            "constant",
            "constant_with_warmup",
        ),
    )
    lr_warmup_steps: int = option(0, "optimizer steps of warm-up", minimum=0)
    lr_num_cycles: int = option(1, "cycles of cosine_with_restarts", minimum=1)
    lr_power: float = option(1.0, "power of polynomial", above=0)
    use_8bit_adam: bool = option(False, "AdamW with 8-bit states (bitsandbytes)")
    adam_beta1: float = option(0.9, "AdamW β₁", minimum=0, maximum=0.9999999)
    adam_beta2: float = option(0.999, "AdamW β₂", minimum=0, maximum=0.9999999)
    adam_weight_decay: float = option(1e-2, "AdamW weight decay", minimum=0)
    adam_epsilon: float = option(1e-8, "AdamW ε", above=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0 = not", minimum=0)
    mixed_precision: str | None = option(
        None, "precision of the forward pass [default: what accelerate is configured for]", choices=("no", "fp16", "bf16")
    )
    allow_tf32: bool = option(False, "TF32 matrix products on Ampere and later")
    enable_xformers_memory_efficient_attention: bool = option(False, "xformers attention (CUDA)")
    dataloader_num_workers: int = option(0, "processes that read the store", minimum=0)

    checkpointing_steps: int = option(500, "optimizer steps between checkpoints", minimum=1)
    checkpoints_total_limit: int | None = option(None, "how many checkpoints are kept", minimum=1)
    time_limit: float | None = option(None, "stop with a checkpoint after so many minutes of training", above=0)
    max_skipped_steps: int = option(
        10, "steps in a row that may be left out because a gradient is not finite; one more is an error", minimum=0
    )
    resume_from_checkpoint: str | None = option(None, "'latest', or a checkpoint's folder")
    report_to: str = option("tensorboard", "tracker; none for no tracker", choices=("tensorboard", "wandb", "none"))
    logging_dir: str = option("logs", "folder of the tracker's files, inside output_dir")
    validation_prompt: list[str] = option([], "prompts for validation images")
    num_validation_images: int = option(4, "images per validation prompt", minimum=1)
    validation_steps: int = option(500, "optimizer steps between validations (images and held-out loss)", minimum=1)
    validation_sampler: str = option(
        "auto",
        "how validation images are drawn; auto is hybrid where the levels below t_n are skipped, else full",
        choices=("auto", "full", "early_stop", "hybrid"),
    )
    validation_inference_steps: int = option(25, "sampler steps of validation images", minimum=1)
    heldout_samples: int = option(256, "held-out images in the held-out loss, at most", minimum=1)

    def validate(self) -> None:
        super().validate()
        if not self.output_dir:
            raise OptionError("--output_dir: a value is required, a folder for the results")
        check_writable("output_dir", self.output_dir)
        if not self.train_data_dir and not self.latents_dir:
            raise OptionError("--train_data_dir: a folder of images is required, or a store with --latents_dir")
        self.validate_data()
        if self.latents_dir and not self.train_data_dir and not (Path(self.latents_dir) / "manifest.json").is_file():
            raise OptionError(
                f"--latents_dir: {self.latents_dir!r} is not a finished store and there is no --train_data_dir"
            )
        if self.heldout_data_dir is not None and not Path(self.heldout_data_dir).is_dir():
            raise OptionError(f"--heldout_data_dir: {self.heldout_data_dir!r} is not a folder")
        self.validate_key(self.output_dir, self.train_data_dir, self.latents_dir, self.heldout_latents_dir)
        self._validate_objective()
        self._validate_machine()

    def _validate_objective(self) -> None:
        if self.low_noise != "skip" and self.t_n is None and self.train_data_dir is not None:
            raise OptionError(f"--low_noise: {self.low_noise!r} has nothing to do at --t_n none; allowed is skip")
        if self.consistency_weight and self.low_noise == "skip":
            raise OptionError(
                f"--consistency_weight: {self.consistency_weight} needs --low_noise consistency or restore, not skip"
            )
        if self.consistency_weight and self.low_noise == "restore" and self.restore_levels == "all":
            raise OptionError("--consistency_weight: has no noisy batch to start from with --restore_levels all")
        if self.low_noise == "consistency" and self.consistency_weight == 0:
            raise OptionError("--consistency_weight: 0 leaves --low_noise consistency nothing to train; allowed is above 0")
        if self.snr_gamma is not None and self.debiased_estimation_loss:
            raise OptionError("--debiased_estimation_loss: true excludes --snr_gamma; allowed is one of them")
        if self.balance_cap is not None and (self.snr_gamma is not None or self.debiased_estimation_loss):
            other = "--debiased_estimation_loss" if self.debiased_estimation_loss else "--snr_gamma"
            raise OptionError(f"--balance_cap: {self.balance_cap:g} excludes {other}; allowed is one of them")
        if self.restore_teacher == "base" and self.consistency_teacher == "ema":
            raise OptionError("--restore_teacher: 'base' excludes --consistency_teacher ema; allowed is ema")
        size = self.restored_per_batch
        if self.restore_refresh is not None and self.restore_refresh > size:
            raise OptionError(
                f"--restore_refresh: {self.restore_refresh} is more than the {size} restored samples of a forward pass"
            )

    @property
    def restored_per_batch(self) -> int:
        """Restored samples in a forward pass."""
        whole = self.restore_levels == "all"
        return self.restore_batch_size or (self.train_batch_size if whole else -(-self.train_batch_size // 2))

    def objective(self):
        """The objective's options, which have the flags' names, but for those that depend on another."""
        from sdxl_ambient.objective import ObjectiveOptions

        given = {f.name: getattr(self, f.name) for f in fields(ObjectiveOptions) if hasattr(self, f.name)}
        if self.consistency_weight is None:
            given["consistency_weight"] = 2.0 if self.low_noise == "consistency" else 0.0
        asked = {"min_snr": self.snr_gamma, "balanced": self.balance_cap, "debiased": self.debiased_estimation_loss}
        given["weighting"] = next((name for name, value in asked.items() if value), "none")
        given["snr_gamma"] = self.snr_gamma or ObjectiveOptions.snr_gamma
        given["balance_cap"] = self.balance_cap or ObjectiveOptions.balance_cap
        return ObjectiveOptions(**given)

    def scalars(self) -> dict:
        """Options as trackers take them, without the place of the key."""
        flat = {k: ", ".join(v) if isinstance(v, list) else v for k, v in asdict(self).items() if k != "noise_key_file"}
        return {k: "none" if v is None else v for k, v in flat.items()}

    def _validate_machine(self) -> None:
        import torch

        if self.enable_xformers_memory_efficient_attention:
            if not torch.cuda.is_available():
                raise OptionError(
                    "--enable_xformers_memory_efficient_attention: true needs a CUDA device; leave it out on a CPU"
                )
            _require("enable_xformers_memory_efficient_attention", "xformers")
        if self.use_8bit_adam:
            _require("use_8bit_adam", "bitsandbytes")
        if self.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise OptionError("--mixed_precision: fp16 needs a CUDA device; on a CPU allowed are no, bf16")
        if self.report_to == "wandb":
            _require("report_to", "wandb")


def _require(name: str, package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise OptionError(f"--{name}: needs the package {package}, which is not installed (pip install {package})")


def check_writable(name: str, folder: str) -> None:
    """A folder that can be made or written into; an OptionError else. Makes nothing."""
    path = Path(folder).resolve()
    if path.exists() and not path.is_dir():
        raise OptionError(f"--{name}: {folder!r} is a file, a folder is needed")
    while not path.exists():
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise OptionError(f"--{name}: {folder!r} can not be written to")
