"""Writes weights in diffusers' formats: a LoRA under peft's names, or a whole UNet."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load

from sdxl_ambient.errors import CheckpointError, InterchangeError
from sdxl_ambient.formats.adapter import Adapter
from sdxl_ambient.formats.files import read_tensors, save_with_hash
from sdxl_ambient.formats.names import LORA_PARTS
from sdxl_ambient.formats.record import ARCHITECTURE, INFO_FILE, LORA_FILE, model_metadata, public_info
from sdxl_ambient.models.lora import changes_base, on_the_base, rebase, taken_apart
from sdxl_ambient.provenance import atomic, read_json, write_json


def peft_file(adapter: Adapter, title: str | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """An adapter → tensors and metadata of ``pytorch_lora_weights.safetensors``, for the stock ``load_lora_weights``.

    Args:
        title: what programs show as its name; by default one of what training recorded.
    """
    config = json.dumps(adapter.peft_metadata(), indent=2, sort_keys=True)
    own = model_metadata(adapter.info, f"{ARCHITECTURE}/lora", "diffusers", title)
    state = {name: tensor.contiguous() for name, tensor in adapter.peft_state().items()}
    return state, {"format": "pt", **own, LORA_ADAPTER_METADATA_KEY: config}


def lora_config(adapter: Adapter, part: str, dropout: float = 0.0) -> LoraConfig:
    """peft's configuration of one part of an adapter."""
    config = adapter.peft_config(part)
    return LoraConfig(
        r=config["r"],
        lora_alpha=config["lora_alpha"],  # pyright: ignore[reportArgumentType]  # any number, whatever peft declares
        rank_pattern=config["rank_pattern"],
        alpha_pattern=config["alpha_pattern"],
        target_modules=config["target_modules"],
        lora_dropout=dropout,
        use_dora=config["use_dora"],
        use_rslora=config["use_rslora"],
    )


def lora_state(model: torch.nn.Module, state: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The trained LoRA under peft's own names (``….lora_A.weight``), on the CPU.

    Not ``convert_state_dict_to_diffusers``: it renames attention layers only, and the stock loader, which tells the layout
    from the first name, then drops all attention weights of a LoRA that has convolutions too.

    Args:
        state: the module's whole state dict, for one whose weights lie in pieces on several devices
            (``accelerator.get_state_dict`` of the wrapped module); by default its own.
    """
    weights = get_peft_model_state_dict(model, state_dict=state, adapter_name="default", save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def save_lora(
    unet,
    folder: str | Path,
    info: dict,
    text_encoders: Sequence | None = None,
    *,
    state: dict[str, torch.Tensor] | None = None,
    text_states: Sequence[dict[str, torch.Tensor] | None] | None = None,
) -> Path:
    """Write ``pytorch_lora_weights.safetensors`` and ``training.json``; a stock pipeline's ``load_lora_weights`` reads it.

    peft's configuration goes along: without it a loader takes alpha for the rank. ``info`` (t_n, objective, …) is stored in
    both files. The weights are those for the base as it is distributed, however the LoRA was started.

    Args:
        unet: the model itself, out of any distributed wrapper, with a LoRA.
        text_encoders: both, likewise, where they have one too.
        state, text_states: their whole state dicts, where they are sharded; see :func:`lora_state`.
    """
    path = Path(folder) / LORA_FILE
    with atomic(path) as temporary:
        write_lora(lora_parts(unet, text_encoders), temporary, [state, *(text_states or ())])
        add_info(temporary, info)
    write_json(Path(folder) / INFO_FILE, public_info(info))
    return path


def lora_parts(unet, text_encoders: Sequence | None) -> dict[str, torch.nn.Module]:
    """Whose LoRA goes into a file, by the names that diffusers has for them."""
    return dict(zip(LORA_PARTS, (unet, *(text_encoders or ())), strict=False))


def write_lora(parts: dict[str, torch.nn.Module], path: Path, states: Sequence = ()) -> None:
    """Write the LoRA of some parts (see :func:`lora_parts`) into one file, as diffusers does.

    Args:
        states: their whole state dicts in the same order, where they are sharded; see :func:`lora_state`.
    """
    layers: dict[str, Any] = {}
    for (part, model), state in zip_longest(parts.items(), states):
        weights, config = _for_file(part, model, state)
        layers |= {f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": config}
    StableDiffusionXLPipeline.save_lora_weights(str(path.parent), **layers, weight_name=path.name)


def _for_file(part: str, model: Any, state: dict[str, torch.Tensor] | None = None) -> tuple[dict[str, torch.Tensor], dict]:
    """A part's weights, by their names in the file but for the part's own, and peft's configuration of them."""
    # Sets have no order and do not go into JSON.
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in model.peft_config["default"].to_dict().items()}
    config["base_model_name_or_path"] = None  # where it lies on this machine is nobody's business
    weights, config = on_the_base(model, lora_state(model, state), config)
    return {in_file(part, name): tensor for name, tensor in weights.items()}, config


def in_file(part: str, name: str) -> str:
    """Text encoders have their layers in text_model or not, by the version of transformers; loaders take this for both.

    transformers drops DoRA's magnitudes under the name that peft gives them.
    """
    if part == "unet":
        return name
    return f"text_model.{name.removeprefix('text_model.')}" + (".weight" if name.endswith(".lora_magnitude_vector") else "")


def add_info(path: Path, info: dict) -> None:
    """Add what training recorded to the metadata of a LoRA's file that is written already."""
    with safe_open(str(path), "pt") as file:
        own = {**(file.metadata() or {}), **model_metadata(info, f"{ARCHITECTURE}/lora", "diffusers")}
    # From bytes: load_file maps the file, and writing to a mapped file pulls the tensors from under one's feet.
    save_with_hash(path, load(path.read_bytes()), own)


def load_lora_state(unet, path: str | Path, text_encoders: Sequence | None = None) -> None:
    """Put a saved LoRA's weights into the adapters that the models already have (a resume adds no second one).

    Raises:
        CheckpointError: unreadable, not finite, or of another rank, other targets or other parts; nothing is loaded then.
    """
    try:
        stored = read_tensors(Path(path))
    except InterchangeError as error:
        raise CheckpointError(str(error)) from None
    parts = lora_parts(unet, text_encoders)
    want = {f"{part}.{n}": w.shape for part, model in parts.items() for n, w in _for_file(part, model)[0].items()}
    if have := stored.keys() - want.keys() or want.keys() - stored.keys():
        missing = len(want.keys() - stored.keys())
        raise CheckpointError(
            f"{path} holds another LoRA: {missing} weights missing, {len(stored.keys() - want.keys())} unknown ({min(have)})"
        )
    if wrong := [name for name, shape in want.items() if stored[name].shape != shape]:
        shapes = f"{tuple(stored[wrong[0]].shape)} instead of {tuple(want[wrong[0]])}"
        raise CheckpointError(f"{path} holds a LoRA of another shape: {wrong[0]} is {shapes}")
    for part, model in parts.items():
        state = {name: stored[f"{part}.{in_file(part, name)}"] for name in lora_state(model)}
        if changes_base(model):
            state, initial = taken_apart(state)
            rebase(model, initial)
        set_peft_model_state_dict(model, state, adapter_name="default")


def save_unet(unet, folder: str | Path, info: dict, *, state: dict[str, torch.Tensor] | None = None) -> Path:
    """Write a fully fine-tuned UNet to ``folder/unet``, loadable with ``UNet2DConditionModel.from_pretrained``.

    Args:
        state: its whole state dict, where it is sharded; see :func:`lora_state`.
    """
    final, temporary = Path(folder) / "unet", Path(folder) / ".unet.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    unet.save_config(str(temporary))
    config = temporary / UNet2DConditionModel.config_name
    # Sharded, the class has another name, which no loader knows.
    write_json(config, {**read_json(config), "_class_name": UNet2DConditionModel.__name__})
    # What save_pretrained does, which takes no state dict.
    weights = unet.state_dict() if state is None else state
    pattern = SAFETENSORS_WEIGHTS_NAME.replace(".", "{suffix}.")
    save_torch_state_dict(weights, str(temporary), filename_pattern=pattern, max_shard_size="10GB")
    replace_folder(temporary, final)
    write_json(Path(folder) / INFO_FILE, public_info(info))
    return final


def replace_folder(temporary: Path, final: Path) -> None:
    """Rename a finished folder into place; the one it replaces is gone only once the new one is there."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    shutil.rmtree(old, ignore_errors=True)
