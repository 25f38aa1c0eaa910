"""Random numbers for a batch, on the CPU, from one generator or from one per sample.

With a generator per sample, what a sample draws doesn't depend on the batch that it is in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from sdxl_ambient.provenance import hash_bytes, hash_json

Generators = torch.Generator | Sequence[torch.Generator] | None


class Randomness:
    """Draws for ``count`` samples. Each call goes on where the one before it stopped.

    Raises:
        ValueError: a list of generators of another length.
    """

    def __init__(self, generator: Generators, count: int):
        # One stream for the whole batch, or one for each sample.
        self._shared: torch.Generator | None = None
        self._own: Sequence[torch.Generator] | None = None
        if isinstance(generator, Sequence):
            if len(generator) != count:
                raise ValueError(f"{len(generator)} generators for {count} samples")
            self._own = generator
        else:
            self._shared = generator
        self.count = count

    def first(self, count: int) -> Randomness:
        """The same for the first ``count`` samples alone."""
        return Randomness(self._shared if self._own is None else self._own[:count], count)

    def uniform(self) -> torch.Tensor:
        """Uniform on [0, 1), float64, (count,)."""
        if self._own is not None:
            return torch.stack([_uniform((), generator) for generator in self._own])
        return _uniform((self.count,), self._shared)

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        """Standard normal of the shape and on the device of ``like`` (count, …); float64 for float64, float32 else."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if self._own is not None:
            drawn = torch.stack([_normal(like.shape[1:], generator, dtype) for generator in self._own])
        else:
            drawn = _normal(like.shape, self._shared, dtype)
        return drawn.to(like.device)


def _uniform(shape: Sequence[int], generator: torch.Generator | None) -> torch.Tensor:
    return torch.rand(shape, generator=generator, device=_device(generator), dtype=torch.float64).cpu()


def _normal(shape: Sequence[int], generator: torch.Generator | None, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=_device(generator), dtype=dtype)


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def sample_generator(seed: int, purpose: str, index: int | str) -> torch.Generator:
    """A CPU generator for one sample; independent for every (seed, purpose, index), which may be a content hash."""
    # A hash, since neighbouring seeds of the Mersenne twister start alike.
    return torch.Generator().manual_seed(int(hash_json([seed, purpose, index])[:8], 16))


def image_seed(seed: int, index: int) -> int:
    """The seed of one drawn image: 63 bits from SHA-256 of (seed, index).

    Images share no noise, and the same index has the same noise in every model.
    """
    return int(hash_bytes(f"{seed}/{index}".encode())[:16], 16) >> 1


def attack_generator(digest: str, t: int, seed: int) -> torch.Generator:
    """The noise that an attack puts on an image, by the SHA-256 of its file, at timestep ``t``."""
    key = hashlib.sha256(f"{digest} {t} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
