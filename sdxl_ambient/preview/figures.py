"""Closed forms of what a noisy latent tells: the best linear estimate, its error, and the nearest latent."""

from __future__ import annotations

import math

import torch


def latent_moments(x_0: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean μ of each channel, (4, 1, 1), and variance s² about it, of latents (n, 4, h, w); both in float64."""
    x_0 = x_0.double()
    mean = x_0.mean((0, 2, 3))[:, None, None]
    return mean, float((x_0 - mean).square().mean())


def linear_reconstruction(
    x_n: torch.Tensor, alpha: float, sigma: float, variance: float, mean: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Best linear estimate of x_0 from x_n = α x_0 + σ z: μ + s²α (x_n − αμ)/(α²s² + σ²), for x_0 of mean μ, variance s².

    What anyone can do without a model, number by number. For Gaussian x_0 it is the posterior mean (the Wiener filter).
    """
    return mean + variance * alpha * (x_n - alpha * mean) / (alpha**2 * variance + sigma**2)


def linear_error(alpha: float, sigma: float, variance: float) -> float:
    """Expected squared error of :func:`linear_reconstruction` per dimension, in units of s²: σ²/(α²s² + σ²), in [0, 1]."""
    return sigma**2 / (alpha**2 * variance + sigma**2)


def decibel(error: float) -> float:
    """An error in units of the signal's variance → dB below it; 0 dB is what a constant guess gets."""
    return -10 * math.log10(max(error, 1e-12))


def nearest(query: torch.Tensor, references: torch.Tensor) -> int:
    """Index of the reference (n, …) with the smallest squared distance to ``query`` (…), in float64; the first of equals."""
    return int(torch.stack([(query.double() - r.double()).square().sum() for r in references]).argmin())
