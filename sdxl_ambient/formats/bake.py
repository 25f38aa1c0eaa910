"""Weight changes of any kind as a plain LoRA of higher rank, which every program reads and can switch off.

Each module's change ΔW is known exactly, with DoRA's lengths or a full fine-tune's. Its best approximation of rank r is that
of the r largest singular values (Eckart and Young 1936). What is lost is measured on the numbers that are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sdxl_ambient.errors import InterchangeError
from sdxl_ambient.formats.adapter import Adapter, Weights
from sdxl_ambient.formats.kohya import in_dtype
from sdxl_ambient.models.load import load_text_encoder, load_unet

# Up to this side a matrix is taken apart exactly; of a larger one the largest values are looked for at random.
_EXACT_SIDE = 640
_OVERSAMPLING, _ITERATIONS = 16, 4  # of the random search (Halko, Martinsson and Tropp 2011)
Change = tuple[str, str, torch.Tensor]  # part, diffusers' module name, ΔW in float32


@dataclass
class Baked:
    """A plain LoRA and what it lost.

    Attributes:
        error: ‖ΔW − LoRA‖ by ‖ΔW‖, of all modules together (Frobenius).
        worst: the same of the module where it is largest, and its name.
        left_out: names of changed weights that no LoRA can hold: biases and norms. share: their part of ‖all changes‖.
    """

    adapter: Adapter
    error: float
    worst: tuple[float, str]
    left_out: list[str] = field(default_factory=list)
    share: float = 0.0

    def lines(self, rank: int) -> list[str]:
        """What was lost, in words."""
        most, place = self.worst
        said = [f"baked into rank {rank}: off by {self.error:.2%} of the change, at most {most:.2%} ({place})"]
        if self.left_out:
            count, first = len(self.left_out), self.left_out[0]
            said.append(f"note: {count} changed biases and norms ({first}, …) are left out: {self.share:.2%} of the change")
        return said


def default_rank(adapter: Adapter | None) -> int:
    """The rank where none is asked for: twice a LoRA's largest, 32 at least; of a full fine-tune (None) 128."""
    if adapter is None:
        return 128
    return max(32, *(2 * weights.rank for modules in adapter.parts.values() for weights in modules.values()))


def bake_lora(
    adapter: Adapter, base: str | Path, rank: int, revision: str | None = None, dtype: torch.dtype | None = None
) -> Baked:
    """A LoRA's change, DoRA's too, for ``base``: a pipeline's folder, a single file or a name on the Hub.

    Args:
        dtype: of the weights that are written, by default float32.

    Raises:
        ModelError: the base can't be loaded.
        InterchangeError: nothing is changed.
    """

    def changes() -> Iterator[Change]:
        for part, modules in adapter.parts.items():
            network = _network(base, part, revision)
            for name, weights in modules.items():
                module: Any = network.get_submodule(name)
                yield part, name, change_of(weights, module.weight.detach().float())

    total = sum(map(len, adapter.parts.values()))
    return _bake(changes(), total, rank, dtype, {**adapter.info, "baked_from": "dora" if adapter.uses_dora else "lora"})


def bake_unet(
    state: Mapping[str, torch.Tensor],
    base: str | Path,
    rank: int,
    info: dict,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
) -> Baked:
    """What a full fine-tune changed of the UNet of ``base``. ``state``: all its weights, by diffusers' names."""
    before = load_unet(base, revision=revision).state_dict()
    differs = [name for name, tensor in before.items() if not torch.equal(tensor, state[name].float())]
    matrices = [name for name in differs if before[name].ndim > 1]
    changes = (("unet", n.removesuffix(".weight"), state[n].float() - before[n]) for n in matrices)
    baked = _bake(changes, len(matrices), rank, dtype, {**info, "finetune": "lora", "baked_from": "full"})
    baked.left_out = [name for name in differs if name not in set(matrices)]
    parts = {name: float((state[name].float() - before[name]).square().sum()) for name in differs}
    baked.share = (sum(parts[name] for name in baked.left_out) / sum(parts.values())) ** 0.5
    return baked


def _network(base: str | Path, part: str, revision: str | None) -> torch.nn.Module:
    if part == "unet":
        return load_unet(base, revision=revision)
    encoder = load_text_encoder(base, part, revision=revision)
    return getattr(encoder, "text_model", encoder)


def change_of(weights: Weights, weight: torch.Tensor) -> torch.Tensor:
    """ΔW of a module whose own weight is W: s·BA, or with DoRA m (W + s·BA)/‖W + s·BA‖ − W, rows' lengths."""
    down, up = weights.down.float().flatten(1), weights.up.float().flatten(1)
    change = (weights.alpha / weights.rank * up @ down).reshape(weight.shape)
    if weights.magnitude is None:
        return change
    merged = weight + change
    lengths = merged.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    return merged * (weights.magnitude.float().reshape(lengths.shape) / lengths) - weight


def _bake(changes: Iterable[Change], total: int, rank: int, dtype: torch.dtype | None, info: dict) -> Baked:
    parts: dict[str, dict[str, Weights]] = {}
    lost = whole = 0.0
    worst = 0.0, "none"
    for part, name, change in tqdm(changes, total=total, desc="baking", unit="module", mininterval=1):
        if not bool(torch.isfinite(change).all()):
            raise InterchangeError(f"the change of {part}.{name} is not finite")
        weights = low_rank(change, rank)
        down, up = (in_dtype(f"{part}.{name}", tensor, dtype) for tensor in (weights.down, weights.up))
        weights = Weights(down, up, weights.alpha)
        off = float((change - change_of(weights, change)).norm())
        size = float(change.norm())
        lost, whole = lost + off**2, whole + size**2
        if size and off / size > worst[0]:
            worst = off / size, f"{part}.{name}"
        parts.setdefault(part, {})[name] = weights
    if not whole:
        raise InterchangeError("nothing is changed; there is nothing to bake")
    error = (lost / whole) ** 0.5
    return Baked(Adapter(parts, {**info, "baked_rank": rank, "baked_error": error}), error, worst)


def low_rank(change: torch.Tensor, rank: int) -> Weights:
    """The best LoRA of at most ``rank`` for ΔW (out, in[, k, k]), both factors of one length.

    alpha is ``rank`` also where the module has fewer: diffusers mistakes alphas that differ between modules.
    """
    matrix, alpha = change.flatten(1), float(rank)
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= _EXACT_SIDE:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=min(rank + _OVERSAMPLING, *matrix.shape), niter=_ITERATIONS)
        vh = v.T
    root = (s[:rank] * rank / alpha).sqrt()
    up, down = u[:, :rank] * root, root[:, None] * vh[:rank]
    ones = [1] * (change.ndim - 2)
    return Weights(down.reshape(rank, *change.shape[1:]).contiguous(), up.reshape(-1, rank, *ones).contiguous(), alpha)
