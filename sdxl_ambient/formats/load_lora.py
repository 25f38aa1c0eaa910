"""Loads a LoRA into a diffusers pipeline, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict

from sdxl_ambient.errors import ModelError, one_line
from sdxl_ambient.formats.adapter import Adapter
from sdxl_ambient.formats.find import lora_file
from sdxl_ambient.formats.merged import MergedChange, needs_merging
from sdxl_ambient.formats.peft import in_file, lora_config
from sdxl_ambient.formats.read import read_adapter
from sdxl_ambient.models.finite import check_finite
from sdxl_ambient.models.load import LOADING_ERRORS

ADAPTER = "adapter"  # what the LoRA is called in the pipeline


def load_lora(pipe: StableDiffusionXLPipeline, lora: str | Path, scale: float = 1.0) -> None:
    """Put a LoRA of the UNet, the text encoders or both into the pipeline: every weight, at its strength, or none.

    The file is read as training reads one to start from. diffusers' own reader leaves out what it can't place or doesn't
    know, with a warning at most: a LoRA for other modules, DoRA's magnitudes in kohya's format, one of two mixed layouts.
    What then draws is a weaker LoRA or the base model, in which nothing is found copied. So every weight is looked for in
    the pipeline afterwards, too.

    What is no LoRA but of LyCORIS's other kinds is merged into the weights: see :mod:`sdxl_ambient.formats.merged`. It is
    then the pipeline's ``merged_change``.

    Args:
        lora: a .safetensors file in peft's, diffusers' or kohya's format, or a directory with one; see
            :func:`sdxl_ambient.formats.read.read_adapter`.
        scale: by which the LoRA's effect is multiplied.

    Raises:
        ModelError: no such file, a damaged one, or one that isn't loaded whole.
    """
    try:
        file = lora_file(lora)
        if needs_merging(file):
            pipe.merged_change = MergedChange(pipe, file)
            pipe.merged_change.apply(scale)
            return
        adapter = read_adapter(lora, dict(pipe.unet.config))
        for part in adapter.parts:
            _load_part(getattr(pipe, part), part, adapter)
    except LOADING_ERRORS as error:
        raise ModelError(f"the LoRA {str(lora)!r} can't be loaded: {one_line(error)}") from None
    _check_whole(pipe, adapter, lora)
    _check_strength(pipe, adapter, lora)
    if scale != 1.0:
        set_strength(pipe, scale)


def set_strength(pipe: Any, scale: float) -> None:
    """Multiply the effect of what :func:`load_lora` loaded by ``scale``, in place of what it was multiplied by."""
    if (merged := getattr(pipe, "merged_change", None)) is not None:
        merged.apply(scale)
    else:
        pipe.set_adapters([ADAPTER], [scale])


def _load_part(model: Any, part: str, adapter: Adapter) -> None:
    """Through diffusers' loader for the UNet, and transformers' for a text encoder."""
    state = {name: tensor for name, tensor in adapter.peft_state().items() if name.startswith(f"{part}.")}
    if part == "unet":
        model.load_lora_adapter(
            state, prefix=part, adapter_name=ADAPTER, metadata=adapter.peft_metadata(), low_cpu_mem_usage=True
        )
        return
    # transformers has an encoder's layers in text_model or not, by its version.
    start = f"{part}." if hasattr(model, "text_model") else f"{part}.text_model."
    state = {name.removeprefix(start): tensor for name, tensor in state.items()}
    config = lora_config(adapter, part)
    model.load_adapter(adapter_name=ADAPTER, adapter_state_dict=state, peft_config=config, low_cpu_mem_usage=True)
    model.to(device=model.device, dtype=model.dtype)


def _check_whole(pipe: StableDiffusionXLPipeline, adapter: Adapter, lora: str | Path) -> None:
    """Every weight of the adapter is in the part of the pipeline that it is for."""
    state, loaded = adapter.peft_state(), {}
    for part in adapter.parts:
        model = getattr(pipe, part)
        weights = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
        loaded |= {f"{part}.{in_file(part, name)}": tensor for name, tensor in weights.items()}
    # In half precision a large weight becomes infinite.
    check_finite({n: t for n, t in loaded.items() if n in state and not t.is_meta}, f"the LoRA {str(lora)!r}")
    missing = [name for name, tensor in state.items() if name not in loaded or not _is_same(loaded[name], tensor)]
    if missing:
        examples = f"{', '.join(missing[:2])}{', …' if len(missing) > 2 else ''}"
        raise ModelError(
            f"the LoRA {str(lora)!r} can't be evaluated: diffusers loads only {len(state) - len(missing)} of its "
            f"{len(state)} weights into SDXL (left out: {examples})"
        )


def _is_same(loaded: torch.Tensor, stored: torch.Tensor) -> bool:
    """The values are the stored ones, in the precision to which the loader may have rounded them."""
    if loaded.is_meta or loaded.shape != stored.shape:
        return False
    return torch.allclose(loaded.cpu(), stored.cpu().to(loaded.dtype), rtol=0, atol=0, equal_nan=True)


def _check_strength(pipe: StableDiffusionXLPipeline, adapter: Adapter, lora: str | Path) -> None:
    """Every module acts with its own alpha / rank."""
    for part, modules in adapter.parts.items():
        for name, layer in getattr(pipe, part).named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            weights = modules[name if part == "unet" else name.removeprefix("text_model.")]
            scale = weights.alpha / weights.rank
            if abs(layer.scaling[ADAPTER] - scale) > 1e-6 * max(1, abs(scale)):
                raise ModelError(
                    f"the LoRA {str(lora)!r} can't be evaluated: diffusers scales weights of its {part} by "
                    f"{layer.scaling[ADAPTER]:g} instead of {scale:g}"
                )
