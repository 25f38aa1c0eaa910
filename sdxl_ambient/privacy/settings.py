"""What is assessed, and how."""

from __future__ import annotations

from dataclasses import dataclass

from sdxl_ambient.images.captions import Columns
from sdxl_ambient.probe import ImageChoice


@dataclass(frozen=True)
class PrivacySettings:
    """Values of the options of ``python -m sdxl_ambient.privacy`` that have these names."""

    pretrained_model_name_or_path: str
    pretrained_vae_model_name_or_path: str | None
    revision: str | None
    variant: str | None
    prediction_type: str | None
    train_data_dir: str | None  # without it, closed forms alone
    reference_data_dir: str | None  # goes with it
    caption_column: str
    caption_encoding: str | None
    instance_prompt: str | None
    caption: bool
    resolution: int
    center_crop: bool
    t_n: list[int]
    num_images: int
    num_candidates: int
    num_references: int
    draws: int
    use_unet: bool
    posterior_samples: int
    steps: int
    dimension: int
    clip_norm: float | None
    delta: float
    seed: int
    device: str
    dtype: str

    @property
    def columns(self) -> Columns:
        """Where captions are."""
        return Columns(self.caption_column, encoding=self.caption_encoding)

    @property
    def attacked(self) -> ImageChoice:
        """The images that are looked for, and those of them that are reconstructed."""
        texts = self.columns, self.instance_prompt, self.caption
        return ImageChoice(str(self.train_data_dir), *texts, self.num_candidates, self.num_images)

    @property
    def references(self) -> ImageChoice:
        """The other images, whose captions nobody reads."""
        texts = self.columns, self.instance_prompt, False
        return ImageChoice(str(self.reference_data_dir), *texts, self.num_references, 1)
