"""What a preview is made of."""

from __future__ import annotations

from dataclasses import dataclass

from sdxl_ambient.images.captions import Columns
from sdxl_ambient.probe import ImageChoice


@dataclass(frozen=True)
class PreviewSettings:
    """Values of the options of ``python -m sdxl_ambient.preview`` that have these names."""

    pretrained_model_name_or_path: str
    pretrained_vae_model_name_or_path: str | None
    revision: str | None
    variant: str | None
    prediction_type: str | None
    train_data_dir: str
    caption_column: str
    caption_encoding: str | None
    instance_prompt: str | None
    caption: bool
    resolution: int
    center_crop: bool
    t_n: list[int]
    num_images: int
    num_candidates: int
    posterior_samples: int
    steps: int
    seed: int
    device: str
    dtype: str
    output_dir: str

    @property
    def choice(self) -> ImageChoice:
        """Which images it shows."""
        return ImageChoice(
            self.train_data_dir,
            Columns(self.caption_column, encoding=self.caption_encoding),
            self.instance_prompt,
            self.caption,
            self.num_candidates,
            self.num_images,
        )
