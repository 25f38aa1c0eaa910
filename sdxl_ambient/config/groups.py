"""The options of training by subject: weights, objective, optimizer, life of a run, watching it, the Hub.

:class:`sdxl_ambient.config.training.TrainOptions` is all of them. Each group checks what concerns it alone.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, fields
from pathlib import Path

from sdxl_ambient.config.parser import APPLIED, FREE, default_of, option, redeclare
from sdxl_ambient.config.shared import SeedOptions
from sdxl_ambient.errors import OptionError
from sdxl_ambient.texts import read_lines

# What a LoRA that is given to start from has already decided.
_DECIDED_BY_LORA = ("rank", "lora_alpha", "lora_targets", "use_dora", "use_rslora", "init_lora_weights")
_CHANGES_THE_BASE = ("pissa", "olora")
_SAMPLERS = ("auto", "full", "early_stop", "hybrid")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")
_OPTIMIZERS = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "adamw_schedulefree": "schedulefree"}


def require(name: str, package: str) -> None:
    """An OptionError where the package that option ``name`` needs isn't installed."""
    if importlib.util.find_spec(package) is None:
        raise OptionError(f"--{name}: needs the package {package}, which is not installed (pip install {package})")


@dataclass
class WeightOptions:
    """Weights that are trained"""

    finetune: str = option("lora", "what is trained", choices=("lora", "full"))
    rank: int = option(16, "rank of the LoRA", minimum=1)
    lora_alpha: float | None = option(None, "scale of the LoRA is alpha/rank [default: the rank]", above=0)
    lora_dropout: float = option(0.0, "dropout in front of the LoRA", minimum=0, maximum=0.99)
    lora_targets: list[str] = option(
        ["attention"],
        "presets attention, attention_ff (with feed-forward), linear, all (with convolutions), or endings of module names",
    )
    use_dora: bool = option(False, "weight-decomposed LoRA (DoRA)")
    use_rslora: bool = option(False, "rank-stabilised LoRA: scale is alpha/sqrt(rank)")
    init_lora_weights: str = option(
        "gaussian",
        "how the LoRA starts; pissa and olora take a part of the base's weights for it, and need linear targets",
        choices=("gaussian", "kaiming", "orthogonal", "pissa", "olora"),
    )
    lora: str | None = option(
        None, "LoRA to start from: a folder or file of ours, of diffusers or of kohya's scripts; it decides rank and targets"
    )
    train_text_encoder: bool = option(
        False, "a LoRA on both text encoders too; captions are then encoded in every step, on the device"
    )
    text_encoder_lr: float | None = option(
        None, "peak learning rate of the text encoders' LoRA [default: --learning_rate]", above=0
    )
    quantize_base: str = option(
        "none", "frozen base weights under a LoRA, held in fewer bits (bitsandbytes)", choices=("none", "int8", "nf4")
    )
    use_ema: bool = option(False, "save, validate and evaluate exponentially averaged weights")
    offload_ema: bool = option(False, "keep the averaged weights in the processor's memory", resume=FREE)

    def validate_weights(self) -> None:
        if self.finetune == "full":
            self._only_lora()
        if self.lora is not None:
            self._from_lora(self.lora)
        if self.text_encoder_lr is not None and not self.train_text_encoder:
            raise OptionError(f"--text_encoder_lr: {self.text_encoder_lr:g} needs --train_text_encoder")
        if self.offload_ema and not self.use_ema:
            raise OptionError("--offload_ema: true needs --use_ema")
        if self.init_lora_weights in _CHANGES_THE_BASE:
            self._changes_the_base()
        if self.quantize_base != "none":
            require("quantize_base", "bitsandbytes")

    def _only_lora(self) -> None:
        wrong = [n for n in ("lora", "use_dora", "use_rslora", "train_text_encoder") if getattr(self, n)]
        wrong += [
            n for n, usual in (("quantize_base", "none"), ("init_lora_weights", "gaussian")) if getattr(self, n) != usual
        ]
        if wrong:
            raise OptionError(f"--{wrong[0]}: {_shown(getattr(self, wrong[0]))} needs --finetune lora, not full")

    def _from_lora(self, lora: str) -> None:
        if not Path(lora).exists():
            raise OptionError(f"--lora: {lora!r} is not there; a folder or .safetensors file is needed")
        usual = {f.name: default_of(f) for f in fields(WeightOptions)}
        for name in _DECIDED_BY_LORA:
            if getattr(self, name) != usual[name]:
                raise OptionError(f"--{name}: {_shown(getattr(self, name))} excludes --lora, which decides it")
        if self.train_text_encoder:
            raise OptionError("--train_text_encoder: true excludes --lora; a LoRA of the UNet alone can be gone on with")

    def _changes_the_base(self) -> None:
        start = self.init_lora_weights
        if self.use_dora or self.quantize_base != "none":
            other = "--use_dora" if self.use_dora else f"--quantize_base {self.quantize_base}"
            raise OptionError(f"--init_lora_weights: {start!r} excludes {other}")
        if "all" in self.lora_targets:
            raise OptionError(f"--init_lora_weights: {start!r} needs linear targets; --lora_targets all has convolutions")


def _shown(value) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass
class LossOptions:
    """Objective"""

    low_noise: str = option(
        "skip",
        "what is done at t <= t_n: skip leaves those levels to the base model, consistency trains them to agree with the "
        "levels above, restore trains them on samples that the model draws given the noisy latents, clean trains them on "
        "clean latents, which are then stored, so that t_n protects nothing there",
        choices=("skip", "consistency", "restore", "clean"),
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
    clean_batch_size: int | None = option(
        None, "clean latents in a forward pass of --low_noise clean [default: half of --train_batch_size]", minimum=1
    )
    clean_weight: float = option(1.0, "weight of the loss on clean latents", above=0)
    ema_decay: float = option(
        0.995,
        "decay of the averaged weights: those of --use_ema, and those that restore and teach",
        minimum=0,
        maximum=0.999999,
    )

    def validate_loss(self) -> None:
        if self.consistency_weight and self.low_noise in ("skip", "clean"):
            raise OptionError(
                f"--consistency_weight: {self.consistency_weight} needs --low_noise consistency or restore, not "
                f"{self.low_noise}"
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


@dataclass
class OptimizerOptions:
    """Optimizer and machine"""

    seed: int = redeclare(SeedOptions, "seed")
    train_batch_size: int = option(16, "samples per process and forward pass", minimum=1, resume=FREE)
    num_train_epochs: int = option(
        100, "passes over the data, where --max_train_steps is not given", minimum=1, resume=APPLIED
    )
    max_train_steps: int | None = option(None, "optimizer steps", minimum=1, resume=APPLIED)
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step", minimum=1)
    gradient_checkpointing: bool = option(False, "recompute activations: slower, less memory", resume=FREE)
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
    optimizer: str = option(
        "adamw",
        "adamw8bit needs bitsandbytes, prodigy prodigyopt (with --learning_rate 1), adamw_schedulefree schedulefree (with "
        "--lr_scheduler constant); adafactor is transformers'",
        choices=("adamw", "adamw8bit", "adafactor", "prodigy", "adamw_schedulefree"),
    )
    use_8bit_adam: bool = option(False, "the same as --optimizer adamw8bit")
    optimizer_args: list[str] = option([], "more arguments of the optimizer, as name=value")
    fused_backward_pass: bool = option(
        False,
        "each weight is updated as soon as its gradient is there, so that all gradients are never held at once: for a full "
        "fine-tune on 24 GB. One process, no accumulation, --max_grad_norm 0, not fp16",
    )
    adam_beta1: float = option(0.9, "β₁ of Adam's kind of optimizer", minimum=0, maximum=0.9999999)
    adam_beta2: float = option(0.999, "β₂ of Adam's kind of optimizer", minimum=0, maximum=0.9999999)
    adam_weight_decay: float = option(1e-2, "weight decay", minimum=0)
    adam_epsilon: float = option(1e-8, "ε of Adam's kind of optimizer", above=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0 = not", minimum=0)
    mixed_precision: str | None = option(
        None, "precision of the forward pass [default: what accelerate is configured for]", choices=("no", "fp16", "bf16")
    )
    allow_tf32: bool = option(False, "TF32 matrix products on Ampere and later", resume=APPLIED)
    enable_xformers_memory_efficient_attention: bool = option(False, "xformers attention (CUDA)", resume=APPLIED)
    dataloader_num_workers: int = option(0, "processes that read the store", minimum=0, resume=FREE)

    def validate_optimizer(self) -> None:
        if self.use_8bit_adam and self.optimizer not in ("adamw", "adamw8bit"):
            raise OptionError(f"--use_8bit_adam: true excludes --optimizer {self.optimizer}")
        if self.optimizer_name in _OPTIMIZERS:
            require("use_8bit_adam" if self.use_8bit_adam else "optimizer", _OPTIMIZERS[self.optimizer_name])
        if self.optimizer == "adamw_schedulefree" and self.lr_scheduler != "constant":
            raise OptionError(
                f"--lr_scheduler: {self.lr_scheduler!r} excludes --optimizer adamw_schedulefree, which has its own; "
                "allowed is constant (--lr_warmup_steps goes to the optimizer)"
            )
        for pair in self.optimizer_args:
            if not pair.partition("=")[0].isidentifier() or "=" not in pair:
                raise OptionError(f"--optimizer_args: {pair!r} is not of the form name=value")
        if self.fused_backward_pass:
            self._fused()

    def _fused(self) -> None:
        wrong = [
            ("gradient_accumulation_steps", self.gradient_accumulation_steps != 1, "1"),
            ("max_grad_norm", self.max_grad_norm != 0, "0, since the norm of all gradients is never known"),
            ("mixed_precision", self.mixed_precision == "fp16", "no, bf16"),
            ("optimizer", self.optimizer_name in ("prodigy", "adamw_schedulefree"), "adamw, adamw8bit, adafactor"),
        ]
        for name, is_wrong, allowed in wrong:
            if is_wrong:
                raise OptionError(f"--{name}: {getattr(self, name)} excludes --fused_backward_pass; allowed is {allowed}")

    @property
    def optimizer_name(self) -> str:
        """Which optimizer, whichever flag says so."""
        return "adamw8bit" if self.use_8bit_adam else self.optimizer

    def validate_machine(self) -> None:
        import torch

        if self.enable_xformers_memory_efficient_attention:
            if not torch.cuda.is_available():
                raise OptionError(
                    "--enable_xformers_memory_efficient_attention: true needs a CUDA device; leave it out on a CPU"
                )
            require("enable_xformers_memory_efficient_attention", "xformers")
        if self.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise OptionError("--mixed_precision: fp16 needs a CUDA device; on a CPU allowed are no, bf16")


@dataclass
class LifeOptions:
    """Checkpoints"""

    checkpointing_steps: int = option(500, "optimizer steps between checkpoints", minimum=1, resume=FREE)
    checkpoints_total_limit: int | None = option(None, "how many checkpoints are kept", minimum=1, resume=FREE)
    time_limit: float | None = option(None, "stop with a checkpoint so many minutes after the start", above=0, resume=FREE)
    max_skipped_steps: int = option(
        10,
        "steps in a row that may be left out because a gradient is not finite; one more is an error",
        minimum=0,
        resume=APPLIED,
    )
    resume_from_checkpoint: str | None = option(None, "'latest', or a checkpoint's folder", resume=FREE)
    trust_checkpoint: bool = option(
        False,
        "go on from a checkpoint of FSDP or DeepSpeed that somebody else wrote; reading its states can run code",
        resume=FREE,
    )
    dry_run: bool = option(
        False,
        "make or check the stores, load everything, say what would be trained, with buckets, counts, a memory estimate and "
        "the first batch's noisy pictures, and stop",
        resume=FREE,
    )


@dataclass
class WatchOptions:
    """Watching a run"""

    report_to: str = option(
        "tensorboard",
        "tracker; all is every one that is installed, none is none",
        choices=(*TRACKERS, "all", "none"),
        resume=FREE,
    )
    logging_dir: str = option("logs", "folder of the tracker's files, inside output_dir", resume=FREE)
    validation_prompt: list[str] = option([], "prompts for validation images", resume=FREE)
    validation_prompts_file: str | None = option(
        None, "text file with one prompt for validation images in a line", resume=FREE
    )
    num_validation_images: int = option(4, "images per validation prompt; 0 for none", minimum=0, resume=FREE)
    validation_steps: int = option(
        500, "optimizer steps between validations (images and held-out loss)", minimum=1, resume=FREE
    )
    validation_sampler: list[str] = option(
        ["auto"],
        "how validation images are drawn; auto is hybrid where the levels below t_n are skipped, else full",
        choices=_SAMPLERS,
        resume=FREE,
    )
    validation_inference_steps: int = option(25, "sampler steps of validation images", minimum=1, resume=FREE)
    heldout_samples: int = option(256, "held-out images in the held-out loss, at most", minimum=1, resume=APPLIED)
    heldout_bands: int = option(
        4,
        "equal ranges of the times above t_n that the held-out loss is taken and shown in",
        minimum=1,
        maximum=50,
        resume=APPLIED,
    )
    early_stopping: int | None = option(
        None,
        "validations in a row without a lower held-out loss after which training stops [default: it doesn't]",
        minimum=1,
        resume=APPLIED,
    )
    max_denoising_gap: float | None = option(
        None,
        "training stops when the held-out loss is above the training images' by more than this part of itself, beyond two "
        "standard errors [default: it doesn't]",
        above=0,
        resume=APPLIED,
    )
    memorization_every: int | None = option(
        None,
        "optimizer steps between short memorisation evaluations of the current weights; needs the images, also held-out "
        "ones [default: none]",
        minimum=1,
        resume=APPLIED,
    )
    memorization_images: int = option(64, "images drawn for each of them", minimum=8, resume=FREE)
    memorization_embedder: str = option(
        "dinov2",
        "embedder of the evaluation that they are compared by, as NAME or NAME=WEIGHTS",
        resume=FREE,
    )

    def validate_watching(self) -> None:
        file = self.validation_prompts_file
        if file is not None and not Path(file).is_file():
            raise OptionError(f"--validation_prompts_file: {file!r} is not a file")
        if self.report_to in TRACKERS and self.report_to != "tensorboard":
            require("report_to", self.report_to)

    @property
    def prompts(self) -> list[str]:
        """All prompts for validation images; none where none are drawn."""
        if self.num_validation_images == 0:
            return []
        file = self.validation_prompts_file
        lines = read_lines(file) if file else []
        return [*self.validation_prompt, *(line for line in lines if not line.startswith("#"))]


@dataclass
class HubOptions:
    """Hugging Face Hub"""

    push_to_hub: bool = option(False, "upload the result with its model card when training is done", resume=FREE)
    hub_model_id: str | None = option(None, "repository on the Hub [default: the output folder's name]", resume=FREE)
    hub_private: bool = option(True, "make that repository a private one", resume=FREE)
    hub_license: str = option("openrail++", "licence in the model card; the default is SDXL's own", resume=FREE)
    memorization_report: str | None = option(
        None,
        "report.json of an evaluation, for the model card [default: OUTPUT_DIR/report/report.json where it is there]",
        resume=FREE,
    )

    def validate_hub(self) -> None:
        if self.hub_model_id is not None and not self.push_to_hub:
            raise OptionError(f"--hub_model_id: {self.hub_model_id!r} needs --push_to_hub")
        if self.memorization_report is not None and not Path(self.memorization_report).is_file():
            raise OptionError(f"--memorization_report: {self.memorization_report!r} is not a file")
