"""A LoRA in memory, whatever layout its file had."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from sdxl_ambient.formats.record import ARCHITECTURE, model_metadata

GENERATIVE_MODELS = "https://github.com/Stability-AI/generative-models"  # ModelSpec's name for whose names these are


@dataclass
class Weights:
    """One module's LoRA: ``down`` (rank, in[, k, k]), ``up`` (out, rank[, 1, 1]), applied times ``alpha / rank``;
    ``magnitude`` (out,), with DoRA. Any dtype."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)


@dataclass
class Adapter:
    """A LoRA, out of whatever file: the weights of each part's modules, by diffusers' names (text encoders' start with
    ``encoder.``), and what training recorded."""

    parts: dict[str, dict[str, Weights]]
    info: dict = field(default_factory=dict)

    @property
    def uses_dora(self) -> bool:
        return any(w.magnitude is not None for modules in self.parts.values() for w in modules.values())

    def peft_state(self) -> dict[str, torch.Tensor]:
        """Under the names that :func:`sdxl_ambient.formats.peft.save_lora` writes, ``unet.….lora_A.weight``."""
        state = {}
        for part, modules in self.parts.items():
            # Text encoders without text_model take such names too, those with it no others.
            start = f"{part}." if part == "unet" else f"{part}.text_model."
            for name, weights in modules.items():
                state[f"{start}{name}.lora_A.weight"] = weights.down
                state[f"{start}{name}.lora_B.weight"] = weights.up
                if weights.magnitude is not None:
                    # peft keeps a convolution's as (1, out, 1, 1).
                    shape = (1, -1, *weights.up.shape[2:]) if weights.up.ndim > 2 else (-1,)
                    # The end that transformers reads.
                    end = "" if part == "unet" else ".weight"
                    state[f"{start}{name}.lora_magnitude_vector{end}"] = weights.magnitude.reshape(shape)
        return state

    def peft_config(self, part: str) -> dict:
        """Arguments of peft's ``LoraConfig``, in which every module has its own rank and alpha."""
        modules = self.parts[part]
        rank, rank_pattern = _pattern({name: weights.rank for name, weights in modules.items()})
        alpha, alpha_pattern = _pattern({name: weights.alpha for name, weights in modules.items()})
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "target_modules": sorted(modules),
            "use_dora": any(weights.magnitude is not None for weights in modules.values()),
            "use_rslora": False,
        }

    def peft_metadata(self) -> dict:
        """All parts' configurations, as diffusers stores them in a LoRA's file."""
        return {f"{part}.{k}": v for part in self.parts for k, v in self.peft_config(part).items()}


def _pattern(values: dict[str, float]) -> tuple[float, dict[str, float]]:
    """The most common value, and the modules with another: by their ending where all with that ending agree.

    peft takes patterns for regular expressions and tries one after the other, so that few of them load faster.
    """
    common = Counter(values.values()).most_common(1)[0][0]
    endings: dict[str, set] = {}
    for name, value in values.items():
        endings.setdefault(_ending(name), set()).add(value)
    pattern = {}
    for name, value in values.items():
        if value != common:
            pattern[_ending(name) if len(endings[_ending(name)]) == 1 else name] = value
    return common, pattern


def _ending(name: str) -> str:
    """``conv1``, ``to_out.0``: the last part of a name, two if the last is a number."""
    return re.search(r"[^.]+(\.\d+)*$", name)[0]


def peft_file(adapter: Adapter, title: str | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of ``pytorch_lora_weights.safetensors``, for the stock ``load_lora_weights``."""
    described = json.dumps(adapter.peft_metadata(), indent=2, sort_keys=True)
    own = model_metadata(adapter.info, f"{ARCHITECTURE}/lora", "diffusers", title)
    state = {name: tensor.contiguous() for name, tensor in adapter.peft_state().items()}
    return state, {"format": "pt", **own, LORA_ADAPTER_METADATA_KEY: described}
