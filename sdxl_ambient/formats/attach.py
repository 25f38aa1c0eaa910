"""Puts a LoRA that was read onto a UNet and its text encoders, to be trained further or sampled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft.utils import set_peft_model_state_dict

from sdxl_ambient.errors import InterchangeError, one_line
from sdxl_ambient.formats.adapter import Adapter
from sdxl_ambient.formats.find import lora_file
from sdxl_ambient.formats.names import LORA_PARTS
from sdxl_ambient.formats.peft import in_file, lora_config, lora_state
from sdxl_ambient.formats.read import read_adapter
from sdxl_ambient.models.lora import text_layers, trainable_to_float32
from sdxl_ambient.provenance import hash_file


def attach(
    unet: torch.nn.Module, adapter: Adapter, text_encoders: Sequence[torch.nn.Module] = (), *, dropout: float = 0.0
) -> None:
    """Freeze ``unet`` and put the adapter in, trainable and in float32, as :func:`sdxl_ambient.models.lora.add_lora` does.

    Training then goes on from it, saves and resumes as from any other. The same holds for both ``text_encoders``, where they
    are trained. One that the adapter says nothing of is left as it is.

    Raises:
        InterchangeError: an adapter without a UNet's weights, or with those of text encoders, which aren't trained, or one
            that doesn't fit.
    """
    models = dict(zip(LORA_PARTS, (unet, *text_encoders), strict=False))
    if others := [part for part in adapter.parts if part not in models]:
        raise InterchangeError(
            f"the LoRA has weights of {' and '.join(others)}; they are trained on with --train_text_encoder"
        )
    if "unet" not in adapter.parts:
        raise InterchangeError("the LoRA has no weights of the UNet")
    state = adapter.peft_state()
    for part in adapter.parts:
        _attach(models[part], part, adapter, {n: tensor for n, tensor in state.items() if n.startswith(f"{part}.")}, dropout)
    if "text_encoder" in adapter.parts:
        # SDXL reads the layer before the first encoder's last one, which never gets a gradient.
        last = f"layers.{text_layers(text_encoders[0]) - 1}."
        for name, parameter in text_encoders[0].named_parameters():
            if last in name:
                parameter.requires_grad_(False)


def _attach(model: Any, part: str, adapter: Adapter, state: dict[str, torch.Tensor], dropout: float) -> None:
    model.requires_grad_(False)
    try:
        model.add_adapter(lora_config(adapter, part, dropout), adapter_name="default")
    except ValueError as error:
        raise InterchangeError(f"the LoRA doesn't fit the {part}: {one_line(error)}") from None
    trainable_to_float32(model)  # before the weights, which a half base's dtype would round
    own = {f"{part}.{in_file(part, name)}": name for name in lora_state(model)}
    if odd := sorted(own.keys() ^ state.keys()):
        raise InterchangeError(f"the LoRA doesn't fit the {part}: {odd[0]}")
    try:
        set_peft_model_state_dict(model, {name: state[stored] for stored, name in own.items()}, adapter_name="default")
    except RuntimeError as error:
        raise InterchangeError(f"the LoRA doesn't fit the {part}: {one_line(error)}") from None


def start_from(
    unet: UNet2DConditionModel, lora: str | Path, text_encoders: Sequence[torch.nn.Module] = (), *, dropout: float = 0.0
) -> dict:
    """Put a LoRA into ``unet``, and into both ``text_encoders`` where they are trained, to train on from.

    Args:
        lora: a file or folder of ours, of diffusers or of kohya's scripts; see :func:`read_adapter`.
        dropout: of what goes into the LoRA, while it is trained.

    Returns:
        what the run's record says of it, which a resume must agree in: {"lora": the file's SHA-256}.

    Raises:
        InterchangeError: as :func:`read_adapter` and :func:`attach`.
    """
    try:
        file = lora_file(lora)
        attach(unet, read_adapter(file, dict(unet.config)), text_encoders, dropout=dropout)
    except InterchangeError as error:
        raise InterchangeError(f"--lora: {error}") from None
    return {"lora": hash_file(file)}
