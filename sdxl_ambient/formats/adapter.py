"""A LoRA in memory, whatever layout its file had."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TypedDict

import torch


@dataclass
class Weights:
    """The LoRA of one module, which adds ``alpha / rank`` · up·down to its weight. Tensors of any dtype.

    Attributes:
        down: (rank, in), of a convolution (rank, in, k, k).
        up: (out, rank), of a convolution (out, rank, 1, 1).
        alpha: the numerator of the scale.
        magnitude: with DoRA, (out,): the length of each row of the changed weight.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)


class PeftConfig(TypedDict):
    """The arguments of peft's ``LoraConfig`` that say what a LoRA does."""

    r: int
    lora_alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: list[str]
    use_dora: bool
    use_rslora: bool


@dataclass
class Adapter:
    """A LoRA of a UNet, of text encoders, or of both.

    Attributes:
        parts: for each of ``unet``, ``text_encoder`` and ``text_encoder_2`` that it changes, the weights of its modules by
            diffusers' names; those of text encoders start with ``encoder.``.
        info: what training recorded; {} for a LoRA from elsewhere.
    """

    parts: dict[str, dict[str, Weights]]
    info: dict = field(default_factory=dict)

    @property
    def uses_dora(self) -> bool:
        """Whether a module has DoRA's magnitudes."""
        return any(w.magnitude is not None for modules in self.parts.values() for w in modules.values())

    def peft_state(self) -> dict[str, torch.Tensor]:
        """The tensors under the names that :func:`sdxl_ambient.formats.peft.save_lora` writes, ``unet.….lora_A.weight``."""
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

    def peft_config(self, part: str) -> PeftConfig:
        """The arguments of peft's ``LoraConfig`` for one part, in which every module has its own rank and alpha."""
        modules = self.parts[part]
        rank, rank_pattern = _pattern({name: weights.rank for name, weights in modules.items()})
        alpha, alpha_pattern = _pattern({name: weights.alpha for name, weights in modules.items()})
        return {
            "r": int(rank),
            "lora_alpha": alpha,
            "rank_pattern": {name: int(value) for name, value in rank_pattern.items()},
            "alpha_pattern": alpha_pattern,
            "target_modules": sorted(modules),
            "use_dora": any(weights.magnitude is not None for weights in modules.values()),
            "use_rslora": False,
        }

    def peft_metadata(self) -> dict:
        """The configurations of all parts, as diffusers stores them in a LoRA's file: ``unet.r``, …"""
        return {f"{part}.{k}": v for part in self.parts for k, v in self.peft_config(part).items()}


def _pattern(values: dict[str, float] | dict[str, int]) -> tuple[float, dict[str, float]]:
    """The most common value, and the modules with another: by their ending where all with that ending agree.

    peft takes patterns for regular expressions and tries one after the other, so that few of them load faster.
    """
    common = Counter(values.values()).most_common(1)[0][0]
    endings: dict[str, set[float]] = {}
    for name, value in values.items():
        endings.setdefault(_ending(name), set()).add(value)
    pattern = {}
    for name, value in values.items():
        if value != common:
            pattern[_ending(name) if len(endings[_ending(name)]) == 1 else name] = value
    return common, pattern


def _ending(name: str) -> str:
    """The last part of a name, or two if the last is a number: ``conv1``, ``to_out.0``."""
    match = re.search(r"[^.]+(\.\d+)*$", name)
    return match[0] if match else name
