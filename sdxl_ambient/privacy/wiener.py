"""The linear filter that an attacker fits to clean latents: the best linear estimate of x_0 from x_n."""

from __future__ import annotations

import numpy as np
import torch

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the stationary covariance beside that of the reference images


class LinearFilter:
    """The Wiener filter x̂_0 = μ + αΣ(α²Σ + σ²I)⁻¹(x_n − αμ), with Σ from reference latents (n, 4, h, w). In float64.

    Σ = λF + (1 − λ)S about the channel means μ. S is the references' own second moment: what is typical of a place, but of
    rank n only. F is its stationary part, a 4×4 matrix per frequency: what is typical anywhere. λ = ``weight``, in [0, 1].
    """

    def __init__(self, references: torch.Tensor, weight: float):
        x = references.double()
        self.mean, self.weight = x.mean((0, 2, 3))[:, None, None], weight
        self.rows = x - self.mean
        frequencies = torch.fft.fft2(self.rows, norm="ortho")
        self.spectrum = torch.einsum("nchw,ndhw->hwcd", frequencies, frequencies.conj()) / len(x)

    def __call__(self, x_n: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        """x̂_0, float64, of noisy latents (m, 4, h, w)."""
        rest = x_n.double() - alpha * self.mean
        # αΣA⁻¹ = (I − σ²A⁻¹)/α with A = α²Σ + σ²I, so that A⁻¹ is all that is needed.
        return self.mean + (rest - sigma**2 * self._solve(rest, alpha, sigma)) / alpha

    def _solve(self, rest: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        """A⁻¹ of each row, by B = σ²I + α²λF, a product in the Fourier domain, and Woodbury's identity for S."""
        eye = torch.eye(len(self.mean), dtype=torch.complex128)
        inverse = torch.linalg.inv(sigma**2 * eye + alpha**2 * self.weight * self.spectrum)

        def solve_b(x: torch.Tensor) -> torch.Tensor:
            return torch.fft.ifft2(torch.einsum("hwcd,ndhw->nchw", inverse, torch.fft.fft2(x))).real

        solution = solve_b(rest)
        if self.weight < 1:
            rows, solved = self.rows.flatten(1), solve_b(self.rows).flatten(1)
            scale = len(rows) / (alpha**2 * (1 - self.weight))
            inner = scale * torch.eye(len(rows), dtype=torch.float64) + solved @ rows.T
            solution = solution - (torch.linalg.solve(inner, rows @ solution.flatten(1).T).T @ solved).view_as(rest)
        return solution


def choose_weight(references: torch.Tensor, alpha: float, sigma: float, seed: int) -> float:
    """The λ whose filter, made of every other reference, errs least on the rest."""
    known, unknown = references[::2], references[1::2].double()
    z = torch.randn(unknown.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x_n = alpha * unknown + sigma * z
    errors = [float((LinearFilter(known, w)(x_n, alpha, sigma) - unknown).square().mean()) for w in WEIGHTS]
    return WEIGHTS[int(np.argmin(errors))]
