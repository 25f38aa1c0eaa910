r"""What noisy latents can give away, in closed form: repeated observations, telling two pictures apart, zCDP. No data.

x_n = α x_0 + σ z as in :mod:`sdxl_ambient.noise`; SNR = α²/σ² = ᾱ/(1 − ᾱ). All in float64.

Sources: Bun and Steinke, "Concentrated Differential Privacy", arXiv 1605.02658: a Gaussian observation is zCDP (Proposition
1.6), zCDP gives (ε, δ) (Proposition 1.3) and adds up over releases (Lemma 1.7). Balle and Wang, "Improving the Gaussian
Mechanism for Differential Privacy", arXiv 1805.06530: the exact (ε, δ) of a Gaussian observation (Theorem 8), which the
library dp-accounting solves for ε and for σ.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import overload

import numpy as np
import torch

from sdxl_ambient.noise import NoiseSchedule


def snr(schedule: NoiseSchedule, t: int) -> float:
    """α²/σ² at level ``t``."""
    return float(schedule.snr(torch.tensor([t])))


def effective_level(schedule: NoiseSchedule, t: int, k: int) -> float | None:
    """The level of one observation that tells as much as ``k`` independent ones at ``t``; None if it is below level 0.

    The mean of k draws is α x_0 + (σ/√k) z, and it is sufficient for x_0: one observation with k times the SNR. Between
    whole levels log SNR is taken as linear.
    """
    table = schedule.snr(torch.arange(schedule.num_timesteps)).numpy()
    known = np.log(table[table > 0])  # decreasing; at zero terminal SNR the last level has no signal
    wanted = math.log(snr(schedule, t)) + math.log(k)
    return None if wanted > known[0] else float(np.interp(-wanted, -known, np.arange(len(known))))


@overload
def pair_error(distance: float, signal_to_noise: float) -> float: ...
@overload
def pair_error(distance: np.ndarray, signal_to_noise: float) -> np.ndarray: ...
def pair_error(distance: float | np.ndarray, signal_to_noise: float) -> float | np.ndarray:
    """Error Φ(−α D/(2σ)) of the best test which of two latents at ``distance`` D, equally likely before, x_n was made of.

    ``distance`` is a number or an array of them; the result is of the same kind.
    """
    half = np.asarray(distance, dtype=np.float64) * math.sqrt(signal_to_noise) / 2
    error = torch.special.erfc(torch.from_numpy(np.atleast_1d(half / math.sqrt(2)))).numpy() / 2
    return float(error[0]) if np.ndim(distance) == 0 else error


def distance_for_error(error: float, signal_to_noise: float) -> float:
    """The latent distance at which the best test of two errs that often, 0 < error ≤ ½: −2 (σ/α) Φ⁻¹(error)."""
    return -2 * NormalDist().inv_cdf(error) / math.sqrt(signal_to_noise)


def rho(clip_norm: float, signal_to_noise: float, k: int = 1) -> float:
    """zCDP of ``k`` observations of a latent of norm at most C = ``clip_norm``: k (2αC)²/(2σ²) = 2 k C² SNR.

    Replacing a picture moves α x_0 by at most 2αC, the sensitivity; the noise has standard deviation σ.
    """
    return 2 * k * clip_norm**2 * signal_to_noise


def gaussian_epsilon(rho: float, delta: float) -> float:
    """The smallest ε for which Gaussian observations of ρ-zCDP in all are (ε, δ)-private.

    It is exact. Several observations are one Gaussian observation with the sum of their ρ.
    """
    # Here since the package takes a second to import, and only this tool needs it.
    from dp_accounting import get_epsilon_gaussian

    # A sensitivity of 1 under noise of standard deviation σ has ρ = 1/(2σ²).
    return float(get_epsilon_gaussian(math.inf if rho == 0 else 1 / math.sqrt(2 * rho), delta))


def gaussian_snr(epsilon: float, delta: float, clip_norm: float) -> float:
    """The largest SNR at which one observation of a latent of norm at most ``clip_norm`` is (ε, δ)-private; exact."""
    from dp_accounting import get_sigma_gaussian  # here as above

    return 1 / (2 * clip_norm * get_sigma_gaussian(epsilon, delta)) ** 2


def zcdp_epsilon(rho: float, delta: float) -> float:
    """ε of (ε, δ)-differential privacy that ρ-zCDP implies, whatever the mechanism: ρ + 2 √(ρ ln(1/δ))."""
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


def zcdp_rho(epsilon: float, delta: float) -> float:
    """The largest ρ whose :func:`zcdp_epsilon` is at most that: (√(L + ε) − √L)² with L = ln(1/δ)."""
    log = math.log(1 / delta)
    return (epsilon / (math.sqrt(log + epsilon) + math.sqrt(log))) ** 2  # the same without a difference of near numbers


def zcdp_snr(epsilon: float, delta: float, clip_norm: float) -> float:
    """The largest SNR at which one observation of a latent of norm at most ``clip_norm`` is (ε, δ)-private by zCDP."""
    return zcdp_rho(epsilon, delta) / (2 * clip_norm**2)
