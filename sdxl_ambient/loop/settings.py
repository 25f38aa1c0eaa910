"""How a round of the loop is drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoopSettings:
    """Values of the options of ``python -m sdxl_ambient.loop`` that have these names."""

    pretrained_model_name_or_path: str
    pretrained_vae_model_name_or_path: str | None
    revision: str | None
    variant: str | None
    prediction_type: str | None
    lora: str | None
    unet: str | None  # excludes ``lora``
    latents_dir: str
    t_n: int
    steps: int
    batch_size: int
    dtype: str
    seed: int
    allow_foreign_model: bool
    output_dir: str

    @property
    def model(self) -> tuple[str, str] | None:
        """The option that names the model to restore with, and its value; None for the base model alone."""
        if self.lora is not None:
            return "lora", self.lora
        return None if self.unet is None else ("unet", self.unet)
