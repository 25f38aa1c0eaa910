"""Whole SDXL models in the original release's layout: the one file that ComfyUI, Forge and ``from_single_file`` load."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from sdxl_ambient.errors import InterchangeError
from sdxl_ambient.formats.kohya import in_dtype
from sdxl_ambient.formats.names import sgm_name

_VAE_INNER = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_INNER |= {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out", "conv_shortcut": "nin_shortcut"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OPEN_CLIP_OUTSIDE = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def original_unet(state: Mapping[str, torch.Tensor], config: Mapping) -> dict[str, torch.Tensor]:
    """diffusers' UNet → ``model.diffusion_model.…``."""
    full = {"layers_per_block": 2, **config}
    split = ((name.rpartition("."), tensor) for name, tensor in state.items())
    return {f"model.diffusion_model.{sgm_name(module, full)}.{leaf}": tensor for (module, _, leaf), tensor in split}


def original_vae(state: Mapping[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    """diffusers' VAE with so many ``levels`` → ``first_stage_model.…``, where attention is a 1×1 convolution.

    Raises:
        InterchangeError: a name of another VAE.
    """
    converted = {}
    for name, tensor in state.items():
        new = _vae_name(name, levels)
        if ".mid.attn_1." in new and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        converted[f"first_stage_model.{new}"] = tensor
    return converted


def _vae_name(name: str, levels: int) -> str:
    module, _, leaf = name.rpartition(".")
    if re.fullmatch(r"(post_)?quant_conv|(en|de)coder\.conv_(in|out)", module):
        return name
    side, *rest = module.split(".")
    if rest == ["conv_norm_out"]:
        return f"{side}.norm_out.{leaf}"
    if len(rest) >= 4 and rest[0] in ("down_blocks", "up_blocks"):
        block, kind, index, *inner = rest[1:]
        # The way up is counted from its end.
        place = f"{side}.down.{block}" if side == "encoder" else f"{side}.up.{levels - 1 - int(block)}"
        inner = ".".join(_VAE_INNER.get(i, i) for i in inner)
        if kind == "resnets":
            return f"{place}.block.{index}.{inner}.{leaf}"
        return f"{place}.{kind.removesuffix('rs')}.{inner}.{leaf}"
    if len(rest) >= 4 and rest[0] == "mid_block":
        kind, index, inner = rest[1], int(rest[2]), ".".join(rest[3:])
        return f"{side}.mid.{'block' if kind == 'resnets' else 'attn'}_{index + 1}.{_VAE_INNER.get(inner, inner)}.{leaf}"
    raise InterchangeError(f"{name} is no weight of SDXL's VAE")


def original_text_encoder(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first text encoder → ``conditioner.embedders.0.transformer.text_model.…``."""
    start = "conditioner.embedders.0.transformer.text_model."
    return {start + name.removeprefix("text_model."): tensor for name, tensor in state.items() if _is_weight(name)}


def original_text_encoder_2(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The second one → ``conditioner.embedders.1.model.…``, OpenCLIP's names: q, k and v in one matrix, the projection
    applied from the right."""
    start, converted = "conditioner.embedders.1.model.", {}
    stacked: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        name = name.removeprefix("text_model.")
        if not _is_weight(name):
            continue
        if name == "text_projection.weight":
            converted[f"{start}text_projection"] = tensor.T
        elif name in _OPEN_CLIP_OUTSIDE:
            converted[start + _OPEN_CLIP_OUTSIDE[name]] = tensor
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            stacked.setdefault(f"{start}transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}", {})[match[2]] = tensor
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            inner = _OPEN_CLIP.get(match[2])
            if inner is None:
                raise InterchangeError(f"{name} is no weight of SDXL's second text encoder")
            converted[f"{start}transformer.resblocks.{match[1]}.{inner}.{match[3]}"] = tensor
        else:
            raise InterchangeError(f"{name} is no weight of SDXL's second text encoder")
    return converted | {name: torch.cat([qkv[i] for i in "qkv"]) for name, qkv in stacked.items()}


def _is_weight(name: str) -> bool:
    return not name.endswith("position_ids")


def original_model(
    parts: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    config: Mapping,
    vae_levels: int = 4,
    predicts_v: bool = False,
    zero_snr: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """All parts' state dicts, by diffusers' names → one SDXL model in the original release's layout.

    ComfyUI, Forge and their like have no scheduler's configuration. They know what the model predicts, and that its last
    level has no signal left, from empty tensors ``v_pred`` and ``ztsnr``.

    Args:
        parts: the state dicts of ``unet``, ``vae``, ``text_encoder`` and ``text_encoder_2``.
        config: the UNet's configuration.
        vae_levels: how many resolutions the VAE has.
        predicts_v: write ``v_pred``.
        zero_snr: write ``ztsnr``.
        dtype: of the weights; by default as they are.

    Raises:
        InterchangeError: a name of another model, or values that ``dtype`` can't hold.
    """
    state = original_unet(parts["unet"], config) | original_vae(parts["vae"], vae_levels)
    state |= original_text_encoder(parts["text_encoder"]) | original_text_encoder_2(parts["text_encoder_2"])
    state = {name: in_dtype(name, tensor, dtype) for name, tensor in state.items()}
    marks = {"v_pred": predicts_v, "ztsnr": zero_snr}
    return state | {name: torch.zeros(0) for name, is_marked in marks.items() if is_marked}
