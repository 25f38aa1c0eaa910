"""The ambient objective: denoising score matching from noisy data, one value per sample.

``denoise(x_t, t)`` is any function that returns the network's output; nothing here knows of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sdxl_ambient.noise import NoiseSchedule

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LOSS_SPACES = ("epsilon", "x_n")


@dataclass(frozen=True)
class ObjectiveOptions:
    """What to minimise. ``loss_space``: "epsilon" weighs every t alike in ε; "x_n" is the error of E[x_n|x_t]."""

    loss_space: str = "epsilon"

    def __post_init__(self):
        if self.loss_space not in LOSS_SPACES:
            raise ValueError(f"loss_space: {self.loss_space!r} is not one of {', '.join(LOSS_SPACES)}")


@dataclass
class Losses:
    """``ambient``: (batch,) loss per sample. ``t``: (batch,) the times drawn. ``total``: scalar to differentiate.

    ``consistency``: (batch,) per sample where the consistency loss is on, else None.
    """

    ambient: torch.Tensor
    t: torch.Tensor
    total: torch.Tensor
    consistency: torch.Tensor | None = None


def draw(
    x: torch.Tensor, generator: torch.Generator | Sequence[torch.Generator] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """u uniform on [0, 1) of shape (batch,) on the CPU, and ξ standard normal like ``x``.

    A list of generators gives every sample its own: what a sample draws then doesn't depend on the batch it is in.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(generator, Sequence):
        if len(generator) != len(x):
            raise ValueError(f"{len(generator)} generators for {len(x)} samples")
        pairs = [
            (torch.rand((), generator=g, device=g.device, dtype=torch.float64).cpu(), _normal(x.shape[1:], g, dtype))
            for g in generator
        ]
        return torch.stack([u for u, _ in pairs]), torch.stack([xi for _, xi in pairs]).to(x.device)
    device = generator.device if generator is not None else "cpu"
    u = torch.rand(len(x), generator=generator, device=device, dtype=torch.float64).cpu()
    return u, _normal(x.shape, generator, dtype).to(x.device)


def _normal(shape, generator: torch.Generator | None, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device if generator else "cpu", dtype=dtype)


def ambient_loss(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_n: torch.Tensor,
    t_n: torch.Tensor,
    t: torch.Tensor,
    xi: torch.Tensor,
    loss_space: str = "epsilon",
) -> torch.Tensor:
    """Ambient denoising score matching at given times and noise; (batch,) mean over all other dimensions.

    ε space: ‖ξ − (ν/σ_t) ε̂(x_t, t)‖². x_n space: the same times (ν/r)², which is ‖x_n − E[x_n|x_t]‖². Both have the
    minimiser E[ε|x_t] (arXiv 2404.10177, Theorem 3.2), and for clean data the first is the plain denoising loss.

    Args:
        x_n: (batch, …) noisy data at levels ``t_n`` (batch,), −1 for clean. t: (batch,) times above t_n.
        xi: noise like ``x_n``.
    """
    t_n, t = t_n.to(x_n.device), t.to(x_n.device)
    x_t = schedule.renoise(x_n, t_n, t, xi)
    epsilon = schedule.epsilon(denoise(x_t, t), x_t, t)
    # The loss is taken in float32 at least, whatever precision the network ran in.
    epsilon = epsilon if epsilon.dtype == torch.float64 else epsilon.float()
    scale = schedule._like(schedule.ambient_scale(t_n, t), epsilon)
    per_sample = (xi - scale * epsilon).square().flatten(1).mean(1)
    if loss_space == "x_n":
        r, nu = schedule.transition(t_n, t)
        per_sample = per_sample * (nu / r).square().to(per_sample)
    return per_sample


def ambient_objective(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_n: torch.Tensor,
    t_n: torch.Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    options: ObjectiveOptions | None = None,
) -> Losses:
    """Draw a time above its own t_n for every sample, renoise to it, and return the losses.

    Args:
        x_n: (batch, …) noisy data. t_n: (batch,) its levels, −1 for clean.
        generator: one for the batch, or a list with one per sample.

    Raises:
        ValueError: some t_n leaves no level above it.
    """
    options = options or ObjectiveOptions()
    u, xi = draw(x_n, generator)
    t = schedule.draw_times(t_n.cpu(), u)
    ambient = ambient_loss(denoise, schedule, x_n, t_n, t, xi, options.loss_space)
    return Losses(ambient=ambient, t=t, total=ambient.mean())
