"""The model that restores, and what its training recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sdxl_ambient.errors import InterchangeError, ModelError
from sdxl_ambient.formats.adapter import Adapter
from sdxl_ambient.formats.attach import attach
from sdxl_ambient.formats.find import lora_file, unet_file
from sdxl_ambient.formats.read import read_adapter
from sdxl_ambient.formats.record import read_training_info
from sdxl_ambient.loop.settings import LoopSettings
from sdxl_ambient.models.load import load_unet, load_unet_file
from sdxl_ambient.models.parts import load_config


def load_model(settings: LoopSettings, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet to restore with, frozen, on the CPU.

    Raises:
        ModelError, InterchangeError: one that can't be loaded, or that is not for this base.
    """
    base = settings.pretrained_model_name_or_path
    if settings.unet is not None:
        unet = _load_unet(settings.unet, settings, dtype)
        wanted = load_config(UNet2DConditionModel, base, subfolder="unet", revision=settings.revision)
        names = ("in_channels", "cross_attention_dim", "addition_embed_type", "projection_class_embeddings_input_dim")
        if wrong := [n for n in names if unet.config.get(n) != wanted.get(n)]:
            raise ModelError(f"--unet: {settings.unet!r} is of another architecture than {base}: its {wrong[0]} differs")
    else:
        unet = load_unet(base, dtype=dtype, revision=settings.revision, variant=settings.variant)
    if settings.lora is not None:
        try:
            attach(unet, read_lora(settings.lora, dict(unet.config)))
        except InterchangeError as error:
            raise InterchangeError(f"--lora: {error}") from None
    return unet.eval().requires_grad_(False)


def _load_unet(path: str, settings: LoopSettings, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet's folder or file, which has no configuration of its own."""
    file = unet_file(path)
    if file is None:
        return load_unet(path, dtype=dtype)
    base, predicts = settings.pretrained_model_name_or_path, settings.prediction_type
    return load_unet_file(file, base, dtype=dtype, revision=settings.revision, prediction_type=predicts)


def read_lora(lora: str, config: dict) -> Adapter:
    """A LoRA of the UNet alone, since a store holds what the base's own text encoders made of its captions.

    Raises:
        InterchangeError: one that is unreadable, for another architecture, or of the text encoders too.
    """
    adapter = read_adapter(lora_file(Path(lora)), config)
    if others := [part for part in adapter.parts if part != "unet"]:
        raise InterchangeError(f"{lora!r} changes {' and '.join(others)} too; only a LoRA of the UNet alone can restore")
    return adapter


def training_info(settings: LoopSettings) -> dict[str, Any]:
    """What training recorded of the model to restore with; {} for the base model, and where nothing is recorded."""
    if settings.model is None:
        return {}
    name, path = settings.model
    return read_training_info(lora_file(Path(path)) if name == "lora" else path)
