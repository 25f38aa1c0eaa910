"""The model's own reverse process, in steps that are given: how samples get below their noise level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch

from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.randomness import Randomness

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@runtime_checkable
class RowWise(Protocol):
    """A ``denoise`` that holds something for each row of its batch, and gives itself for other rows."""

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, /) -> torch.Tensor: ...

    def rows(self, index: slice, /) -> Denoise:
        """For some rows of the batch."""
        ...

    def repeated(self, times: int, /) -> Denoise:
        """For the batch several times in a row."""
        ...


def rows_of(denoise: Denoise, index: slice) -> Denoise:
    """``denoise`` for some rows of its batch; itself where it knows no rows."""
    return denoise.rows(index) if isinstance(denoise, RowWise) else denoise


def repeated(denoise: Denoise, times: int) -> Denoise:
    """``denoise`` for its batch ``times`` times in a row; itself where it knows no rows."""
    return denoise.repeated(times) if isinstance(denoise, RowWise) else denoise


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """What a network gave, in float32 if it ran in less: losses and samples are never made in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def posterior_mean(denoise: Denoise, schedule: NoiseSchedule, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """h(x_t, t) = x̂_0, in float32 at least whatever precision the network runs in. x_t (batch, …), t (batch,)."""
    return schedule.denoised(at_least_float32(denoise(x_t, t)), x_t, t)


def spaced_times(start: torch.Tensor, end: torch.Tensor, steps: int, power: float = 1.0) -> torch.Tensor:
    """Timesteps (steps + 1, batch) from ``start`` down to ``end``, both (batch,) and both included.

    Even for ``power`` 1; above it, the steps get shorter towards ``end``.
    """
    share = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:, None] ** power
    return (end + share * (start - end)).round().to(torch.int64)


@torch.no_grad()
def ancestral_steps(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x: torch.Tensor,
    times: torch.Tensor,
    randomness: Randomness,
) -> torch.Tensor:
    """x at ``times[-1]``, from ``x`` at ``times[0]`` by one ancestral step from each time to the next; no graph.

    Each step draws x_s from q(x_s | x_t, x̂_0) (Ho et al. 2020, eq. 7), which is the model's reverse process for small steps.
    A step of no length leaves a sample as it is. Costs ``len(times) − 1`` evaluations.

    Args:
        x: (batch, …). times: (steps + 1, batch) timesteps, never increasing, on the CPU.
    """
    for t, s in zip(times[:-1], times[1:], strict=True):
        t_x = t.to(x.device)
        x_0 = posterior_mean(denoise, schedule, x, t_x)
        x = schedule.reverse_step(x, x_0, t_x, s.to(x.device), randomness.normal(x))
    return x


@torch.no_grad()
def sample_posterior(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_n: torch.Tensor,
    t_n: torch.Tensor,
    steps: int,
    randomness: Randomness,
) -> torch.Tensor:
    """A posterior sample x̃_0 given x_n: the reverse chain from x_n, which *is* x_t at t = t_n; no graph.

    The E-step of expectation-maximisation (Bai et al., arXiv 2405.13712; Hosseintabar et al., arXiv 2510.12691). The last of
    the ``steps`` evaluations is at a low t and gives x̂_0: the times fall quadratically, since x̂_0 = E[x_0|x_t] at a higher t
    would have lost the detail that a sample must have. t_n (batch,), every one of them ≥ 0.
    """
    times = spaced_times(t_n, torch.zeros_like(t_n), steps, power=2)[:-1]
    x = ancestral_steps(denoise, schedule, x_n, times, randomness)
    return posterior_mean(denoise, schedule, x, times[-1].to(x.device))
