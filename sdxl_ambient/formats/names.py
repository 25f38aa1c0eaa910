"""Names of the UNet's and text encoders' modules in the layouts of diffusers, kohya's scripts and the original SDXL."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sdxl_ambient.errors import InterchangeError

LAYOUTS = ("sgm", "diffusers")
SDXL_UNET: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# The parts that a LoRA changes, with what their names begin with in kohya's format. In diffusers' they begin with the part's
# own name. lora_te_ is the first text encoder's in SD 1.5's scripts.
KOHYA_PREFIXES = {"unet": ("lora_unet_",), "text_encoder": ("lora_te1_", "lora_te_"), "text_encoder_2": ("lora_te2_",)}
LORA_PARTS = tuple(KOHYA_PREFIXES)
_SGM = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_SGM_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def sgm_name(module: str, config: Mapping) -> str:
    """The original release's name for a module of diffusers' SDXL UNet (``config`` is the UNet's).

    The original numbers all layers of the way down through, and all of the way up; a layer is a resnet (0), its attention
    (1) and, at the end of a level, the sampler.
    """
    if module in _SGM_OUTSIDE:
        return _SGM_OUTSIDE[module]
    place, *rest = module.split(".")
    if place == "mid_block":
        kind, index, *inner = rest
        # resnet, attention, resnet
        return _joined("middle_block", 1 if kind == "attentions" else 2 * int(index), kind, inner)
    block, kind, index, *inner = rest
    layers, block, index = config["layers_per_block"], int(block), int(index)
    if place == "down_blocks":
        # conv_in is number 0.
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op"
        return _joined(f"input_blocks.{block * (layers + 1) + index + 1}", int(kind == "attentions"), kind, inner)
    number = block * (layers + 1) + (layers if kind == "upsamplers" else index)
    if kind == "upsamplers":
        after_attention = "CrossAttn" in config["up_block_types"][block]
        return f"output_blocks.{number}.{1 + after_attention}.conv"
    return _joined(f"output_blocks.{number}", int(kind == "attentions"), kind, inner)


def _joined(block: str, number: int, kind: str, inner: list[str]) -> str:
    first = _SGM.get(inner[0], inner[0]) if kind == "resnets" else inner[0]
    return ".".join([block, str(number), first, *inner[1:]])


def unet_shapes(config: Mapping | None = None) -> dict[str, tuple[int, ...]]:
    """Name → shape of every weight and bias of an SDXL UNet, without making it. By default SDXL's own.

    Raises:
        InterchangeError: a configuration of another architecture.
    """
    return _shapes(json.dumps(dict(SDXL_UNET if config is None else config), sort_keys=True, default=str))


@functools.lru_cache(maxsize=4)
def _shapes(config: str) -> dict[str, tuple[int, ...]]:
    values = {k: v for k, v in json.loads(config).items() if not k.startswith("_")}
    if values.get("addition_embed_type") != "text_time" or not isinstance(values.get("layers_per_block", 2), int):
        raise InterchangeError("the base model's UNet is not SDXL's, whose names alone are known")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**values)
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}


def unet_names(layout: str, config: Mapping | None = None) -> dict[str, str]:
    """diffusers' name → kohya's, of all linear and convolutional modules of an SDXL UNet."""
    full = {"layers_per_block": 2, **(SDXL_UNET if config is None else config)}
    modules = [n.removesuffix(".weight") for n, shape in unet_shapes(config).items() if n.endswith(".weight") and shape[1:]]
    named = {n: "lora_unet_" + (sgm_name(n, full) if layout == "sgm" else n).replace(".", "_") for n in modules}
    assert len(set(named.values())) == len(named)
    return named
