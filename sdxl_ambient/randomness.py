"""Random numbers for a batch, on the CPU, from one generator or from one per sample.

With a generator per sample, what a sample draws doesn't depend on the batch that it is in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdxl_ambient.provenance import hash_json

Generators = torch.Generator | Sequence[torch.Generator] | None


class Randomness:
    """Draws for ``count`` samples. Each call goes on where the one before it stopped.

    Raises:
        ValueError: a list of generators of another length.
    """

    def __init__(self, generator: Generators, count: int):
        self.many = isinstance(generator, Sequence)
        if self.many and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} samples")
        self.generator, self.count = generator, count

    def first(self, count: int) -> Randomness:
        """The same for the first ``count`` samples alone."""
        return Randomness(self.generator[:count] if self.many else self.generator, count)

    def uniform(self) -> torch.Tensor:
        """Uniform on [0, 1), float64, (count,)."""
        if self.many:
            return torch.stack([self._uniform((), g) for g in self.generator])
        return self._uniform((self.count,), self.generator)

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        """Standard normal of the shape and on the device of ``like`` (count, …); float64 for float64, float32 else."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if self.many:
            return torch.stack([self._normal(like.shape[1:], g, dtype) for g in self.generator]).to(like.device)
        return self._normal(like.shape, self.generator, dtype).to(like.device)

    @staticmethod
    def _uniform(shape, generator: torch.Generator | None) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=_device(generator), dtype=torch.float64).cpu()

    @staticmethod
    def _normal(shape, generator: torch.Generator | None, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=_device(generator), dtype=dtype)


def _device(generator: torch.Generator | None):
    return generator.device if generator is not None else "cpu"


def sample_generator(seed: int, purpose: str, index: int | str) -> torch.Generator:
    """A CPU generator for one sample; independent for every (seed, purpose, index), which may be a content hash."""
    # A hash, since neighbouring seeds of the Mersenne twister start alike.
    return torch.Generator().manual_seed(int(hash_json([seed, purpose, index])[:8], 16))
