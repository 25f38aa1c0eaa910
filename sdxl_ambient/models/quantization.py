"""The frozen base under a LoRA, held in 8 or 4 bits (LLM.int8(), arXiv 2208.07339; QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import logging
from typing import Any

import torch

from sdxl_ambient.errors import OptionError, one_line

# Linear layers of the attention blocks: 86 % of SDXL's weights. What embeds the time and the sizes stays exact.
_PART = "attentions"


def quantized_layers(unet: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The layers that are held in fewer bits, by name."""
    return {n: m for n, m in unet.named_modules() if type(m) is torch.nn.Linear and _PART in n.split(".")}


def quantize(unet: torch.nn.Module, kind: str, device: torch.device | str | None = None) -> None:
    """Replace those layers by bitsandbytes' own, ``int8`` or ``nf4`` (double quantisation), one after the other.

    They are computed in the precision that the UNet was loaded in. Before a LoRA is attached, which peft then puts around
    them; the saved LoRA is that of any other base. ``device`` is where the layers go, by default the GPU, else the CPU
    (slow, for tests); the rest of the UNet stays where it is.

    Raises:
        OptionError: bitsandbytes is not there, or has nothing for this device.
    """
    # It says at import that a package of faster kernels for some CPUs isn't there, and in every forward pass of every layer
    # that int8's inputs are rounded to float16.
    for noisy in ("backends.cpu.ops", "autograd._functions"):
        logging.getLogger(f"bitsandbytes.{noisy}").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # an optional package
    except ImportError as error:
        raise OptionError(f"--quantize_base: {kind} needs the package bitsandbytes: {one_line(error)}") from None
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for name, layer in quantized_layers(unet).items():
        try:
            new = _LAYERS[kind](bitsandbytes.nn, layer).to(device)
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = one_line(error)
            raise OptionError(f"--quantize_base: {kind} can't be computed on {device}: {reason}; allowed is none") from None
        unet.set_submodule(name, new)
    # What peft and diffusers ask before they put a LoRA on such layers.
    for name, value in (("is_loaded_in_8bit", kind == "int8"), ("is_loaded_in_4bit", kind == "nf4")):
        setattr(unet, name, value)


def _int8(nn: Any, layer: torch.nn.Linear) -> torch.nn.Module:
    sizes = (layer.in_features, layer.out_features)
    # Columns with values above 6 are computed in half precision, as in the paper.
    new = nn.Linear8bitLt(*sizes, bias=layer.bias is not None, has_fp16_weights=False, threshold=6.0, device="meta")
    new.weight = nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    return new


def _nf4(nn: Any, layer: torch.nn.Linear) -> torch.nn.Module:
    sizes, dtype = (layer.in_features, layer.out_features), layer.weight.dtype
    new = nn.Linear4bit(*sizes, bias=layer.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta")
    new.weight = nn.Params4bit(
        layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
    )
    new.bias = layer.bias
    # On some CPUs it would repack the weights for a kernel that is not there, and fails where sides are no multiple of 64.
    new.support_avx512bf16_for_cpu = False
    return new


_LAYERS = {"int8": _int8, "nf4": _nf4}


def quantized_bytes(weight: torch.Tensor, kind: str) -> int:
    """Bytes of one weight (out, in) as held by ``int8`` or ``nf4``, with its scales, from its shape alone.

    ``int8``: a byte each and a float32 per row. ``nf4``: half a byte each, in blocks of 64 with a scale of one byte; those
    scales in blocks of 256 with a float32; and tables of 16 and 256 float32 and an offset per weight.
    """
    if kind == "int8":
        return weight.numel() + 4 * weight.shape[0]
    blocks = -(-weight.numel() // 64)
    return -(-weight.numel() // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)
