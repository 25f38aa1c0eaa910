"""Converts a LoRA's file to kohya's or peft's format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from sdxl_ambient.errors import InterchangeError
from sdxl_ambient.formats.adapter import Adapter
from sdxl_ambient.formats.files import new_folder, write_tensors
from sdxl_ambient.formats.kohya import in_dtype, to_kohya
from sdxl_ambient.formats.peft import peft_file
from sdxl_ambient.formats.read import read_adapter
from sdxl_ambient.formats.record import INFO_FILE, LORA_FILE
from sdxl_ambient.provenance import write_json


def export_lora(
    lora: str | Path | Adapter,
    output: Path,
    *,
    format: str,
    layout: str = "sgm",
    config: Mapping | None = None,
    dtype: torch.dtype | None = None,
    title: str | None = None,
    allow_dora: bool = False,
) -> str:
    """Convert a LoRA. Returns the lines that say what was written.

    Args:
        lora: a .safetensors file or a folder with one (see :func:`sdxl_ambient.formats.read.read_adapter`), or what was
            read of one.
        output: the file to write, for ``peft`` the folder. Nothing may be there.
        format: ``kohya`` or ``peft``.
        layout: whose names the UNet's blocks have in kohya's format, ``sgm`` or ``diffusers``.
        config: the configuration of the UNet that it is for; by default SDXL's own.
        dtype: of the weights; by default as they are.
        title: what programs show as its name; by default one of what training recorded, else the output's.
        allow_dora: in kohya's format, write DoRA's magnitudes, which nearly every program reads otherwise.

    Raises:
        InterchangeError: one that can't be converted whole.
        OSError: an output that can't be written; nothing is left of it then.
    """
    adapter = lora if isinstance(lora, Adapter) else read_adapter(lora, config)
    if format == "kohya" and adapter.uses_dora and not allow_dora:
        raise InterchangeError(
            f"{lora} is a DoRA, which this format's readers draw wrongly: {READERS_OF_DORA}. Give --bake for a plain LoRA, "
            "--format peft for diffusers, or --allow_dora"
        )
    if format == "kohya":
        title = title or (None if adapter.info else output.stem)
        write_tensors(output, *to_kohya(adapter, layout, config=config, dtype=dtype, title=title))
        return "\n".join([summary(output, output, adapter), *notes(adapter, layout)])
    state, metadata = peft_file(adapter, title or (None if adapter.info else output.name))
    with new_folder(output) as folder:
        write_tensors(folder / LORA_FILE, {n: in_dtype(n, t, dtype) for n, t in state.items()}, metadata)
        if adapter.info:
            write_json(folder / INFO_FILE, adapter.info)
    return summary(output, output / LORA_FILE, adapter)


READERS_OF_DORA = (
    "A1111 and InvokeAI divide by the lengths of inputs instead of outputs, ComfyUI divides by those of the base weights, "
    "and diffusers and kohya's scripts leave the magnitudes out; LyCORIS alone reads them as they were trained"
)
# Whose name A1111 translates to a place that SDXL doesn't have.
_LOST_BY_A1111 = "up_blocks.0.upsamplers.0.conv"


def notes(adapter: Adapter, layout: str = "sgm") -> list[str]:
    """Where other programs read a file in kohya's format otherwise than it is meant."""
    lines = []
    if adapter.uses_dora:
        lines.append(f"note: of DoRA in this format, {READERS_OF_DORA}; diffusers reads --format peft as it was trained")
    if layout == "diffusers" and _LOST_BY_A1111 in adapter.parts.get("unet", {}):
        lost = f"lora_unet_{_LOST_BY_A1111.replace('.', '_')}"
        lines.append(f"note: A1111 leaves out {lost} of this layout; --layout sgm is read whole")
    if any(len({w.alpha for w in modules.values()}) > 1 for modules in adapter.parts.values()):
        lines.append(
            "note: diffusers mistakes alphas that differ between modules in this format; it reads --format peft as it was "
            "trained, and programs with readers of their own (ComfyUI, kohya's scripts) this one too"
        )
    return lines


def summary(output: Path, file: Path, adapter: Adapter) -> str:
    """What was written: modules per part, ranks, alphas, bytes."""
    weights = [w for modules in adapter.parts.values() for w in modules.values()]
    parts = ", ".join(f"{len(modules)} modules of {part}" for part, modules in adapter.parts.items())
    ranks, alphas = (_spread({getattr(w, name) for w in weights}) for name in ("rank", "alpha"))
    dora = ", DoRA" if adapter.uses_dora else ""
    return f"{output}: {parts}, rank {ranks}, alpha {alphas}{dora}, {file.stat().st_size:,} bytes"


def _spread(values: set[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
