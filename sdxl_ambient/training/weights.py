"""Which model a run starts from, and which weights of it are trained, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict


@dataclass(frozen=True)
class BaseModel:
    """Where the base model is. Values of the options of these names."""

    pretrained_model_name_or_path: str
    pretrained_vae_model_name_or_path: str | None = None
    revision: str | None = None
    variant: str | None = None
    prediction_type: str | None = None


class LoraArguments(TypedDict):
    """What :func:`sdxl_ambient.models.lora.add_lora` and :func:`~sdxl_ambient.models.lora.add_text_lora` are given alike."""

    rank: int
    alpha: float
    targets: list[str]
    dropout: float
    use_dora: bool
    use_rslora: bool
    init: str


@dataclass(frozen=True)
class WeightSettings:
    """Which weights are trained, and how the modules that hold them run. Values of the options of these names."""

    finetune: str
    rank: int
    lora_alpha: float | None  # None: the rank
    lora_dropout: float
    lora_targets: list[str]
    use_dora: bool
    use_rslora: bool
    init_lora_weights: str
    lora: str | None
    train_text_encoder: bool
    quantize_base: str
    gradient_checkpointing: bool
    enable_xformers_memory_efficient_attention: bool

    @property
    def alpha(self) -> float:
        """The LoRA's strength is this by its rank."""
        return self.lora_alpha or self.rank

    @property
    def lora_arguments(self) -> LoraArguments:
        """The LoRA that is added where none is given."""
        return LoraArguments(
            rank=self.rank,
            alpha=self.alpha,
            targets=self.lora_targets,
            dropout=self.lora_dropout,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            init=self.init_lora_weights,
        )
