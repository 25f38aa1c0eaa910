"""An adapter → the layout of kohya's scripts.

diffusers' own ``convert_state_dict_to_kohya`` is not used, since it writes alpha = rank, which changes the adapter's scale.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Mapping

import torch

from sdxl_ambient.errors import InterchangeError
from sdxl_ambient.formats.adapter import Adapter
from sdxl_ambient.formats.names import KOHYA_PREFIXES, unet_names
from sdxl_ambient.formats.record import ARCHITECTURE, GENERATIVE_MODELS, model_metadata


def _kohya_text_name(part: str, module: str) -> str:
    return KOHYA_PREFIXES[part][0] + f"text_model.{module}".replace(".", "_")


def to_kohya(
    adapter: Adapter,
    layout: str = "sgm",
    *,
    config: Mapping | None = None,
    dtype: torch.dtype | None = None,
    title: str | None = None,
    date: str | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """An adapter → what kohya's scripts, ComfyUI, A1111 and their like read: tensors and metadata of a safetensors file.

    Names as in kohya-ss/sd-scripts, networks/lora.py: ``lora_unet_…`` with the original release's blocks (``sgm``) or
    diffusers' (``diffusers``), ``lora_te1_…``, ``lora_te2_…``; ``lora_down`` (rank, in[, k, k]), ``lora_up``
    (out, rank[, 1, 1]), ``alpha``, a number, and, for DoRA as LyCORIS has it, ``dora_scale`` (out, 1[, 1, 1]).

    Args:
        layout: whose names the UNet's blocks have, ``sgm`` or ``diffusers``.
        config: the configuration of the UNet that it is for; by default SDXL's own.
        dtype: of the weights; by default as they are.
        title: what programs show as its name; by default one of what training recorded.
        date: ISO 8601; by default today's.

    Raises:
        InterchangeError: what the format can't hold, or values that ``dtype`` can't.
    """
    state: dict[str, torch.Tensor] = {}
    for part, modules in adapter.parts.items():
        named = unet_names(layout, config) if part == "unet" else {m: _kohya_text_name(part, m) for m in modules}
        for module, weights in modules.items():
            kohya = named[module]
            state[f"{kohya}.lora_down.weight"] = in_dtype(kohya, weights.down, dtype)
            state[f"{kohya}.lora_up.weight"] = in_dtype(kohya, weights.up, dtype)
            state[f"{kohya}.alpha"] = _exact(weights.alpha)
            if weights.magnitude is not None:
                shape = (-1, *(1 for _ in weights.down.shape[1:]))
                state[f"{kohya}.dora_scale"] = in_dtype(kohya, weights.magnitude.reshape(shape), dtype)
    return state, kohya_metadata(adapter, title, date)


def _exact(number: float) -> torch.Tensor:
    """float32 where that is exact: kohya's files have it so. rsLoRA's α√rank takes float64."""
    short = torch.tensor(number, dtype=torch.float32)
    return short if float(short) == number else torch.tensor(number, dtype=torch.float64)


def in_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """``tensor`` in ``dtype``, contiguous. Raises InterchangeError where a finite value becomes infinite."""
    if dtype is None or not tensor.is_floating_point():
        return tensor.contiguous()
    short = tensor.to(dtype)
    if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(short).all()):
        raise InterchangeError(f"{name} has values too large for {str(dtype).removeprefix('torch.')}; take bfloat16")
    return short.contiguous()


def kohya_metadata(adapter: Adapter, title: str | None = None, date: str | None = None) -> dict[str, str]:
    """ModelSpec's keys, ours, and those of kohya's that its scripts call the minimum, with the base model's name.

    The rank and alpha are those of most modules; each module's own stand in its tensors.
    """
    weights = [w for modules in adapter.parts.values() for w in modules.values()]
    rank, alpha = Counter((w.rank, w.alpha) for w in weights).most_common(1)[0][0]
    metadata = model_metadata(adapter.info, f"{ARCHITECTURE}/lora", GENERATIVE_MODELS, title)
    arguments: dict = {}
    if kernels := [(w.rank, w.alpha) for w in weights if w.down.ndim > 2 and max(w.down.shape[2:]) > 1]:
        conv_rank, conv_alpha = Counter(kernels).most_common(1)[0][0]
        arguments = {"conv_dim": str(conv_rank), "conv_alpha": str(conv_alpha)}
    if adapter.uses_dora:
        # The kind of network in LyCORIS that has magnitudes, of the outputs.
        arguments = {"algo": "locon", "dora_wd": "True", "wd_on_output": "True", **arguments}
    metadata |= {
        "modelspec.date": date or datetime.date.today().isoformat(),
        "ss_network_module": "lycoris.kohya" if adapter.uses_dora else "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps(arguments),
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_output_name": metadata["modelspec.title"],
    }
    if adapter.info.get("base_model"):
        metadata["ss_sd_model_name"] = str(adapter.info["base_model"])
    return metadata
