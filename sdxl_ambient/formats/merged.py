"""Weight changes that are no LoRA: LyCORIS's LoHa, LoKr, OFT, BOFT, Tucker's LoCon, full differences and norms.

They can be looked at, not trained or converted: each module's change is merged into its weight, and can be taken out again.
The changes are computed by LyCORIS's own functions (``pip install lycoris-lora``), its factor α/r applied once; its modules'
merge applies that of LoHa and LoKr twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sdxl_ambient.errors import InterchangeError, one_line
from sdxl_ambient.formats.files import read_tensors
from sdxl_ambient.formats.names import KOHYA_PREFIXES, LORA_PARTS, sgm_name
from sdxl_ambient.formats.record import DAMAGED_FILE
from sdxl_ambient.models.finite import check_finite

# What follows a module's name, of the kinds that a LoRA's file doesn't have.
_OWN = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b"),
    *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "oft_blocks", "rescale", "diff", "diff_b", "w_norm", "b_norm"),
    "lora_mid.weight",
)
_SHARED = ("lora_up.weight", "lora_down.weight", "alpha", "dora_scale")
_KINDS = (*_OWN, *_SHARED)
# Of each algorithm, what a module must have and may have besides.
_ALGORITHMS = {
    "LoHa": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2", "alpha", "dora_scale")),
    "LoKr": ((), (*(f"lokr_{n}" for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")), "alpha", "dora_scale")),
    "LoCon": (("lora_up.weight", "lora_down.weight"), ("lora_mid.weight", "alpha", "dora_scale")),
    "OFT": (("oft_blocks",), ("rescale", "alpha")),
    "full difference": (("diff",), ("diff_b", "alpha")),
    "norm": (("w_norm",), ("b_norm", "alpha")),
}
_OUTSIDE = ("lora_", "lycoris_", "diffusion_model.")


def is_merged_only(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these names is of LyCORIS's kinds, and not a LoRA in kohya's format."""
    ours = [_split(name)[1] for name in names if name.startswith(_OUTSIDE)]
    return any(kind in _OWN for kind in ours)


def needs_merging(file: Path) -> bool:
    """Whether a file's changes can only be merged: those kinds, or DoRA whose lengths are those of inputs.

    Raises:
        InterchangeError: it can't be read.
    """
    try:
        with safe_open(str(file), "pt") as opened:
            names = list(opened.keys())
            scales = [name for name in names if name.startswith(_OUTSIDE) and name.endswith(".dora_scale")]
            lengths = [opened.get_slice(name).get_shape() for name in scales]
    except DAMAGED_FILE as error:
        raise InterchangeError(f"{file} can't be read: {one_line(error)}") from None
    return is_merged_only(names) or any(len(shape) > 1 and shape[0] == 1 < shape[1] for shape in lengths)


def _split(name: str) -> tuple[str, str]:
    """A tensor's name → its module's and its kind; ("…", "") for a kind that isn't known."""
    kind = next((kind for kind in _KINDS if name.endswith(f".{kind}")), "")
    return (name.removesuffix(f".{kind}"), kind) if kind else (name, "")


@dataclass
class _Change:
    """The change of one module: what the file has of it, and what the module was before."""

    name: str
    part: str
    module: Any
    tensors: dict[str, torch.Tensor]
    before: dict[str, torch.Tensor] = field(default_factory=dict)


class MergedChange:
    """The changes that a file holds, put into a pipeline's networks at a strength, and taken out again.

    Args:
        pipe: a ``StableDiffusionXLPipeline``, without adapters.
        file: a .safetensors file with kohya's prefixes (``lora_unet_``, ``lora_te1_``, ``lora_te2_``; either layout),
            LyCORIS's own (``lycoris_``, of the UNet) or ComfyUI's (``diffusion_model.``).

    Raises:
        InterchangeError: LyCORIS isn't installed, or a tensor has no place in this model; it is named.
    """

    def __init__(self, pipe: Any, file: Path):
        self.file, self.scale, self.functional = file, 0.0, _lycoris(file)
        modules = _modules_by_name(pipe)
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in read_tensors(file, besides=".alpha").items():
            module, kind = _split(name)
            if not tensor.is_floating_point() and kind != "alpha":
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise InterchangeError(f"{file}: {name} is of {dtype}, which is no weight's")
            if not kind or module not in modules:
                raise InterchangeError(f"{file}: {name} has no place in this model, or is of an unknown kind")
            groups.setdefault(module, {})[kind] = tensor
        self.changes = [_Change(name, *modules[name], tensors) for name, tensors in groups.items()]
        if len({id(change.module) for change in self.changes}) < len(self.changes):
            raise InterchangeError(f"{file}: it names a module twice; it mixes two layouts")

    @property
    def parts(self) -> set[str]:
        """The networks that are changed."""
        return {change.part for change in self.changes}

    def apply(self, scale: float) -> None:
        """Put the changes in at this strength, in place of what was there.

        Raises:
            InterchangeError: one that doesn't fit; the weights are then as they were.
        """
        self.remove()
        self.scale = scale
        try:
            for change in self.changes:
                self._merge(change, scale)
        except InterchangeError:
            self.remove()
            raise

    def remove(self) -> None:
        """The weights as they were before."""
        for change in self.changes:
            for name, tensor in change.before.items():
                getattr(change.module, name).data.copy_(tensor)

    @torch.no_grad()
    def _merge(self, change: _Change, scale: float) -> None:
        module, tensors = change.module, {kind: tensor.float().cpu() for kind, tensor in change.tensors.items()}
        algorithm = self._algorithm(change)
        before = module.weight.detach().float().cpu()
        try:
            after = _changed(algorithm, before, tensors, self.functional)
            merged = {"weight": torch.lerp(before, after.reshape(before.shape), scale)}
            if (bias := tensors.get("diff_b", tensors.get("b_norm"))) is not None:
                merged["bias"] = module.bias.detach().float().cpu() + scale * bias.reshape(module.bias.shape)
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            place, why = f"{change.part}'s weight of shape {tuple(before.shape)}", one_line(error)
            raise InterchangeError(f"{self.file}: {change.name} ({algorithm}) doesn't fit {place}: {why}") from None
        for name, tensor in merged.items():
            own = getattr(module, name)
            tensor = tensor.to(own.dtype)
            check_finite({f"{change.name}.{name}": tensor}, f"{self.file}, merged", InterchangeError)
            change.before.setdefault(name, own.data.detach().to("cpu", copy=True))
            own.data.copy_(tensor)

    def _algorithm(self, change: _Change) -> str:
        """What the tensors of a change are. Raises InterchangeError where some are missing or left over."""
        has = set(change.tensors)
        for name, (needed, besides) in _ALGORITHMS.items():
            if has & ({*needed, *besides} - {"alpha", "dora_scale"}):
                if missing := [kind for kind in needed if kind not in has]:
                    raise InterchangeError(f"{self.file}: {change.name} ({name}) is incomplete: {missing[0]} is missing")
                if name == "LoKr" and (half := _missing_half(has)):
                    raise InterchangeError(f"{self.file}: {change.name} (LoKr) is incomplete: {half} is missing")
                if unused := sorted(has - {*needed, *besides}):
                    raise InterchangeError(f"{self.file}: {change.name} has {unused[0]}, which {name} doesn't have")
                return name
        raise InterchangeError(f"{self.file}: {change.name} is incomplete: it has {', '.join(sorted(has))} alone")


def _missing_half(has: set[str]) -> str | None:
    """Of LoKr's two matrices, each whole or in two factors, what isn't there."""
    for half in ("lokr_w1", "lokr_w2"):
        factors = [f"{half}_a", f"{half}_b"]
        if half not in has and not has.issuperset(factors):
            return next((f for f in factors if f not in has), half) if has & set(factors) else half
    return None


def _changed(algorithm: str, weight: torch.Tensor, tensors: Mapping[str, torch.Tensor], functional: Any) -> torch.Tensor:
    """The weight with its whole change, float32."""
    if algorithm in ("full difference", "norm"):
        return weight + tensors["diff" if algorithm == "full difference" else "w_norm"].reshape(weight.shape)
    if algorithm == "OFT":
        return _rotated(weight, tensors, functional)
    get = tensors.get
    if algorithm == "LoHa":
        factors = [tensors[f"hada_{name}"] for name in ("w1_b", "w1_a", "w2_b", "w2_a")]
        gamma = _alpha(tensors, len(factors[0])) / len(factors[0])
        change = functional.loha.diff_weight(*factors, get("hada_t1"), get("hada_t2"), gamma=gamma, backend="torch")
    elif algorithm == "LoKr":
        names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        one, a, b, *rest = (get(f"lokr_{name}") for name in names)
        # The rank of the half that has one; of two whole matrices there is no factor.
        ranked = b if b is not None else rest[2]
        gamma = 1.0 if ranked is None else _alpha(tensors, len(ranked)) / len(ranked)
        change = functional.lokr.kron_weight(one, a, b, *rest, scale=gamma, backend="torch")
    else:
        if weight.ndim == 2 and "lora_mid.weight" in tensors:
            raise ValueError("Tucker's core (lora_mid) is there for convolutions alone")
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        gamma = _alpha(tensors, len(down)) / len(down)
        change = functional.locon.diff_weight(down, up, get("lora_mid.weight"), gamma=gamma, backend="torch")
    changed = weight + change.reshape(weight.shape)
    return changed if "dora_scale" not in tensors else _with_lengths(changed, tensors["dora_scale"])


def _rotated(weight: torch.Tensor, tensors: Mapping[str, torch.Tensor], functional: Any) -> torch.Tensor:
    """OFT's, of blocks (n, b, b), or BOFT's, of (m, n, b, b). alpha is a limit on the rotation here, 0 for none."""
    blocks, limit = tensors["oft_blocks"], float(tensors.get("alpha", 0.0)) * len(weight)
    own = functional.diag_oft if blocks.ndim == 3 else functional.boft
    return weight + own.diff_weight(weight, blocks, tensors.get("rescale"), constraint=limit, backend="torch")


def _with_lengths(weight: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """DoRA's: each row, or for lengths (1, in, …) each column, is made as long as ``lengths`` says."""
    dims = [d for d in range(weight.ndim) if d != (0 if len(lengths) == len(weight) else 1)]
    return weight * lengths / torch.linalg.vector_norm(weight, dim=dims, keepdim=True)


def _alpha(tensors: Mapping[str, torch.Tensor], rank: int) -> float:
    """A module's alpha; without one the factor α/r is 1."""
    return float(tensors.get("alpha", rank))


def _lycoris(file: Path) -> Any:
    try:
        from lycoris import functional
        from lycoris.functional import boft, diag_oft, locon, loha, lokr  # noqa: F401 - attributes of it from here on
    except ImportError:
        raise InterchangeError(
            f"{file} holds weight changes of LyCORIS (LoHa, LoKr, OFT, differences, norms), which its own package reads: "
            "pip install lycoris-lora"
        ) from None
    return functional


def _modules_by_name(pipe: Any) -> dict[str, tuple[str, Any]]:
    """Every name that a module with a weight may have in such a file → its part and the module."""
    named: dict[str, tuple[str, Any]] = {}
    config = {"layers_per_block": 2, **dict(pipe.unet.config)}
    for name, module in _weighted(pipe.unet):
        original = sgm_name(name, config)
        for one in (f"lora_unet_{_flat(name)}", f"lora_unet_{_flat(original)}", f"lycoris_{_flat(name)}"):
            named[one] = "unet", module
        named[f"diffusion_model.{original}"] = "unet", module
    for part in LORA_PARTS[1:]:
        for name, module in _weighted(getattr(pipe, part)):
            inner = name.removeprefix("text_model.")
            for prefix in KOHYA_PREFIXES[part]:
                named[prefix + _flat(f"text_model.{inner}")] = named[prefix + _flat(inner)] = part, module
    return named


def _weighted(network: torch.nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in network.named_modules() if isinstance(getattr(m, "weight", None), torch.Tensor)]


def _flat(name: str) -> str:
    return name.replace(".", "_")
