"""What is recorded of a run: what a resume must agree in, and what stands with the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sdxl_ambient.errors import CheckpointError, InterchangeError
from sdxl_ambient.formats.find import lora_file
from sdxl_ambient.formats.record import public_info, read_training_info
from sdxl_ambient.models.lora import lora_targets
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.objective import ObjectiveOptions
from sdxl_ambient.store.checks import common_t_n, observed_t_n
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.training.posterior_buffer import RestoreOptions
from sdxl_ambient.training.weights import WeightSettings

_SAME = ("low_noise", "consistency_teacher", "consistency_every", "consistency_start")
_SAME_SHOWN = ("random_flip", "proportion_empty_prompts")
_SAME_RESTORE = ("restore_start", "restore_teacher")
_SAME_AVERAGES = ("ema_decay", "use_ema")
_SAME_OPTIMIZER = (
    *("learning_rate", "text_encoder_lr", "scale_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power"),
    *("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "fused_backward_pass"),
    "quantize_base",
)


@dataclass(frozen=True)
class RunRecordSettings:
    """What a resume must agree in, beside the weights and the data.

    objective: what is minimised. restore: how samples are restored; None without. optimizer: its name, whichever option
    says so. The rest are values of the options of these names.
    """

    objective: ObjectiveOptions
    restore: RestoreOptions | None
    optimizer: str
    optimizer_args: list[str]
    seed: int
    prediction_type: str | None  # where it isn't the scheduler's
    gradient_accumulation_steps: int
    low_noise: str
    consistency_teacher: str
    consistency_every: int
    consistency_start: int
    random_flip: bool
    proportion_empty_prompts: float
    restore_start: int
    restore_teacher: str
    ema_decay: float
    use_ema: bool
    learning_rate: float
    text_encoder_lr: float | None
    scale_lr: bool
    lr_scheduler: str
    lr_warmup_steps: int
    lr_num_cycles: int
    lr_power: float
    adam_beta1: float
    adam_beta2: float
    adam_weight_decay: float
    adam_epsilon: float
    max_grad_norm: float
    fused_backward_pass: bool
    quantize_base: str

    @property
    def averages(self) -> bool:
        """Whether averaged weights have a part in the run."""
        return self.use_ema or self.consistency_teacher == "ema" or self.restore is not None


@dataclass(frozen=True)
class InfoSettings:
    """What stands with the weights, beside what their store says. Values of the options of these names."""

    pretrained_model_name_or_path: str
    low_noise: str
    loss_space: str
    finetune: str
    lora: str | None
    resolution: int  # where the store has none


def lora_record(weights: WeightSettings) -> dict:
    """What a resume must agree in, out of a LoRA's settings: a LoRA of another strength or start is another run.

    {} for a full fine-tune. Of a LoRA that training starts from (``--lora``), the file decides the rest; see
    :func:`sdxl_ambient.formats.attach.start_from`.
    """
    if weights.finetune != "lora":
        return {}
    record = {"lora_dropout": weights.lora_dropout, "train_text_encoder": weights.train_text_encoder}
    if weights.lora is None:
        record |= {n: getattr(weights, n) for n in ("rank", "use_dora", "use_rslora", "init_lora_weights")}
        record["lora_alpha"] = float(weights.alpha)
        record["lora_targets"] = sorted(lora_targets(weights.lora_targets))
    return record


def run_record(settings: RunRecordSettings, store: LatentStore, samples_per_step: int, weights: dict) -> dict:
    """What a checkpoint must agree in: a resume under another of these would not continue the same run.

    ``weights``: what :class:`sdxl_ambient.training.model.TrainableModel` says of what is trained.
    """
    names = [
        *_SAME,
        *_SAME_SHOWN,
        *_SAME_OPTIMIZER,
        *(_SAME_RESTORE if settings.restore else ()),
        *(_SAME_AVERAGES if settings.averages else ()),
    ]
    return {
        **weights,
        "store": store.hash,
        **({"restored": store.public_lineage} if store.public_lineage else {}),
        **({"prediction_type": settings.prediction_type} if settings.prediction_type else {}),
        "seed": settings.seed,
        "samples_per_step": samples_per_step,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "optimizer": settings.optimizer,
        "optimizer_args": sorted(settings.optimizer_args),
        **{name: getattr(settings, name) for name in names},
        **asdict(settings.objective),
        **(asdict(settings.restore) if settings.restore else {}),
    }


def training_info(settings: InfoSettings, store: LatentStore, schedule: NoiseSchedule, step: int) -> dict:
    """What is recorded with the weights: t_n, the objective, base model and data by name and hash; of restored samples the
    level that their images were observed at and how they were drawn; of a LoRA that training started from its own record.
    """
    base = settings.pretrained_model_name_or_path
    latent, t_n = store.manifest["fingerprint"]["latent"], common_t_n(store)
    return {
        "t_n": t_n,
        "sigma": float(schedule.sigma(torch.tensor([t_n]))[0]) if isinstance(t_n, int) else None,
        "low_noise": settings.low_noise,
        "loss_space": settings.loss_space,
        "finetune": settings.finetune,
        "base_model": Path(base).name if Path(base).exists() else base,
        "data": store.hash,
        **({"observed_t_n": observed_t_n(store), "restored": store.public_lineage} if store.public_lineage else {}),
        **({"started_from": _record_of(settings.lora)} if settings.lora is not None else {}),
        "images": len(store),
        "prediction_type": schedule.prediction_type,
        "resolution": latent.get("resolution", settings.resolution),
        "step": step,
    }


def _record_of(lora: str) -> dict:
    """What a LoRA that training started from says of its own training; {} for nothing, and for one that has gone since."""
    try:
        return public_info(read_training_info(lora_file(Path(lora))))
    except (InterchangeError, CheckpointError, OSError):
        return {}
