"""Loads a LoRA into a diffusers pipeline, whole or not at all."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from sdxl_ambient.errors import CheckpointError, ModelError, one_line
from sdxl_ambient.formats.record import LORA_FILE, lora_metadata
from sdxl_ambient.models.load import LOADING_ERRORS
from sdxl_ambient.provenance import hash_bytes

ADAPTER = "adapter"  # what the LoRA is called in the pipeline
# The parts of the pipeline that a LoRA changes, with what their weights' names begin with in diffusers' and kohya's formats.
STATE_PREFIXES = {
    "unet": ("unet.", "lora_unet_"),
    "text_encoder": ("text_encoder.", "lora_te1_", "lora_te_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
}


@contextmanager
def _without_advice():
    """Without diffusers' warnings of parts that a LoRA leaves alone: whether all of it was loaded is checked afterwards."""
    logger = logging.getLogger("diffusers.loaders.lora_base")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_lora(pipe: StableDiffusionXLPipeline, lora: str | Path, scale: float = 1.0) -> None:
    """Put a LoRA of the UNet, the text encoders or both into the pipeline: every weight, at its strength, or none.

    diffusers leaves out what it can't place or doesn't know, with a warning at most: a LoRA for other modules, DoRA's
    magnitudes in kohya's format, one of two mixed layouts. What then draws is a weaker LoRA or the base model, in which
    nothing is found copied. So every tensor of the file is looked for in the pipeline afterwards.

    Args:
        lora: a .safetensors file in diffusers' or kohya's format, either of its layouts, or a directory with one.

    Raises:
        ModelError: no such file, a damaged one, or one that isn't loaded whole.
    """
    file = _lora_file(Path(lora))
    precisions = {part: getattr(pipe, part).dtype for part in STATE_PREFIXES}
    try:
        described = {name.split(".")[0] for name in lora_metadata(file)}
        weights = load_file(str(file))
        if kohya := any(name.endswith(".lora_down.weight") for name in weights):
            weights = _without_alphas(weights)
            with _without_advice():
                pipe.load_lora_weights(dict(weights), adapter_name=ADAPTER)
        else:
            where = dict(weight_name=file.name, use_safetensors=True)
            with _without_advice():
                pipe.load_lora_weights(str(file.parent), adapter_name=ADAPTER, **where)
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    except (*LOADING_ERRORS, TypeError, AttributeError) as error:
        raise ModelError(f"the LoRA {str(lora)!r} can't be loaded: {one_line(error)}") from None
    _check_whole(pipe, weights, precisions, lora)
    _check_strength(pipe, set() if kohya else described, lora)
    if scale != 1.0:
        pipe.set_adapters([ADAPTER], [scale])


def _lora_file(path: Path) -> Path:
    """The file itself, or a directory's ``pytorch_lora_weights.safetensors`` or only .safetensors file."""
    if path.suffix == ".safetensors":
        return path
    if (path / LORA_FILE).is_file():
        return path / LORA_FILE
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise ModelError(f"the LoRA {str(path)!r} can't be loaded: {len(found)} .safetensors files there; give one file")
    return found[0]


def _without_alphas(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """kohya's format with each module's alpha / rank multiplied into its weights, so that a loader need not heed it.

    diffusers takes alphas that differ between the modules of a text encoder for one and the same.
    """
    folded = {name: tensor for name, tensor in weights.items() if not name.endswith(".alpha")}
    for name, alpha in weights.items():
        module = name.removesuffix(".alpha")
        if name == module or f"{module}.lora_down.weight" not in weights:
            continue
        up, rank = f"{module}.lora_up.weight", len(weights[f"{module}.lora_down.weight"])
        folded[up] = weights[up].float() * (float(alpha) / rank)
    return folded


def _check_whole(pipe, weights: dict[str, torch.Tensor], precisions: dict[str, torch.dtype], lora) -> None:
    """Every tensor of the file is a weight of the part of the pipeline that its name says, whatever it is called there."""
    adapted = {
        part: getattr(pipe, part) for part in STATE_PREFIXES if ADAPTER in getattr(getattr(pipe, part), "peft_config", {})
    }
    loaded = Counter()
    for part, model in adapted.items():
        state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
        loaded.update((part, _fingerprint(tensor, precisions[part])) for tensor in state.values())
    missing = []
    for name, tensor in weights.items():
        part = next((part for part, starts in STATE_PREFIXES.items() if name.startswith(starts)), None)
        key = (part, part and _fingerprint(tensor, precisions[part]))
        if loaded[key] > 0:
            loaded[key] -= 1
        else:
            missing.append(name)
    if missing or not weights:
        examples = f" (left out: {', '.join(missing[:2])}{', …' if len(missing) > 2 else ''})" if missing else ""
        raise ModelError(
            f"the LoRA {str(lora)!r} can't be evaluated: diffusers loads only {len(weights) - len(missing)} of its "
            f"{len(weights)} weights into SDXL{examples}"
        )


def _fingerprint(tensor: torch.Tensor, precision: torch.dtype) -> str | None:
    """Of the values alone, in the part's precision, to which the loader may have rounded; None for an empty placeholder."""
    if tensor.is_meta:
        return None
    values = tensor.detach().to("cpu", precision).contiguous().reshape(-1)
    return hash_bytes(values.view(torch.uint8).numpy().data)


def _check_strength(pipe, described: set[str], lora) -> None:
    """Parts without a configuration in the file act as they are: up·down, not scaled."""
    for part in STATE_PREFIXES.keys() - described:
        layers = [m for m in getattr(pipe, part).modules() if isinstance(m, BaseTunerLayer) and ADAPTER in m.scaling]
        if wrong := {layer.scaling[ADAPTER] for layer in layers if abs(layer.scaling[ADAPTER] - 1) > 1e-6}:
            raise ModelError(
                f"the LoRA {str(lora)!r} can't be evaluated: diffusers scales weights of its {part} by {min(wrong):g}"
            )
