"""How a set is annotated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AnnotateSettings:
    """Values of the options of ``python -m sdxl_ambient.annotate`` that have these names.

    annotations.json keeps them all.
    """

    pretrained_model_name_or_path: str
    pretrained_vae_model_name_or_path: str | None
    revision: str | None
    variant: str | None
    prediction_type: str | None
    trusted_data_dir: str
    untrusted_data_dir: str
    caption_column: str
    caption_encoding: str | None
    instance_prompt: str | None
    resolution: int
    center_crop: bool
    levels: list[int]
    margin: float
    max_t_n: int
    trusted_t_n: int | None
    train_steps: int
    batch_size: int
    learning_rate: float
    num_noises: int
    folds: int
    seed: int
    device: str
    output_dir: str
