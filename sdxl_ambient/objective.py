"""The objective, one value per sample: ambient denoising score matching, consistency, and extra rows.

``denoise(x_t, t)`` is any function that returns the network's output; nothing here knows of diffusers. One that holds
something for each row of the batch, as a caption's embedding, also has ``denoise.rows(index)``, the same for some rows, and
``denoise.repeated(times)``, the same for the batch several times in a row (:class:`sdxl_ambient.models.denoiser.Denoiser`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sdxl_ambient.levels import CLEAN
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.posterior import (
    Denoise,
    ancestral_steps,
    at_least_float32,
    posterior_mean,
    repeated,
    rows_of,
    spaced_times,
)
from sdxl_ambient.randomness import Generators, Randomness

CHOICES = {
    "loss_space": ("epsilon", "x_n"),
    "weighting": ("none", "min_snr", "debiased", "balanced"),
    "t_sampling": ("uniform", "near"),
    "consistency_anchor": ("ambient", "boundary", "chain"),
    "consistency_space": ("x_0", "snr"),
    "consistency_estimator": ("single", "both"),
}


@dataclass(frozen=True)
class ObjectiveOptions:
    """What to minimise.

    loss_space: "epsilon" weighs every t alike in ε; "x_n" is the error of E[x_n|x_t].
    weighting, snr_gamma, balance_cap: see :func:`snr_weight`. t_sampling: "near" draws half of the times close above t_n.
    antithetic: every sample stands in the forward pass twice, with noise ξ and −ξ; its loss is the mean of the two. What
    the target's noise adds to the gradient is odd in ξ to first order in ν, so just above t_n nearly all of it cancels.
    consistency_weight: 0 turns it off. For the rest of its options see :func:`consistency_loss`.
    restore_weight: of the loss on restored (or clean) samples, beside the ambient one's 1.
    """

    loss_space: str = "epsilon"
    weighting: str = "none"
    snr_gamma: float = 5.0
    balance_cap: float = 25.0
    t_sampling: str = "uniform"
    antithetic: bool = False
    consistency_weight: float = 0.0
    consistency_anchor: str = "ambient"
    consistency_steps: int = 4
    consistency_max_step: int = 50
    consistency_space: str = "x_0"
    consistency_estimator: str = "single"
    consistency_stop_anchor: bool = False
    consistency_batch: int | None = None
    restore_weight: float = 1.0

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name in ("consistency_steps", "consistency_max_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not at least 1")
        if self.balance_cap < 1:
            raise ValueError(f"balance_cap: {self.balance_cap} is not at least 1")


@dataclass
class ExtraRows:
    """Rows without noise of their own: x_0 (m, …), and the highest timestep (m,) that each is trained at.

    They are samples that the model itself drew, or clean latents; ``name`` says in the log which. In the batch that
    ``denoise`` sees they follow the noisy samples.
    """

    x_0: torch.Tensor
    t_max: torch.Tensor
    name: str = "restored"


@dataclass(frozen=True)
class Anchor:
    """What the consistency loss compares with: x_a (batch, …) at times ``a`` (batch,) ≥ 1, and g = h(x_a, a), (batch, …)."""

    x: torch.Tensor
    t: torch.Tensor
    mean: torch.Tensor


@dataclass(frozen=True)
class Known:
    """What the ambient loss leaves for the consistency loss: x_n at t_n, x_t at t, and the network's output on it with its
    graph. All (batch, …), times (batch,) on the CPU."""

    x_n: torch.Tensor
    t_n: torch.Tensor
    x_t: torch.Tensor
    t: torch.Tensor
    output: torch.Tensor


@dataclass
class Losses:
    """``ambient``: (batch,) loss per sample. ``t``: (batch,) the times drawn. ``total``: scalar to differentiate.

    ``consistency``: (batch or consistency_batch,) where the consistency loss is on, unweighted, an unbiased estimate that
    may be negative; 0 for samples that have no pair. ``extra``: (m,) where extra rows were given. Else None.
    ``name``: what the latter are called in the log.
    """

    ambient: torch.Tensor
    t: torch.Tensor
    total: torch.Tensor
    consistency: torch.Tensor | None = None
    extra: torch.Tensor | None = None
    name: str = "restored"

    def means(self) -> dict[str, torch.Tensor]:
        """Scalars to log: the total, and each part's mean before its weight."""
        parts = {"ambient": self.ambient, "consistency": self.consistency, self.name: self.extra}
        means = {name: values.detach().mean() for name, values in parts.items() if values is not None and len(values)}
        return {"loss": self.total.detach(), **means}


# -- denoising score matching ----------------------------------------------------------------------


def snr_weight(
    schedule: NoiseSchedule, t_n: torch.Tensor, t: torch.Tensor, weighting: str, gamma: float = 5.0, cap: float = 25.0
) -> torch.Tensor:
    """Weight (batch,) of the ambient loss, float64: 1, min-SNR-γ, debiased, or balanced.

    The two published weights come from the signal-to-noise ratio of what the network is asked to find in x_t. In the ambient
    loss that is x_n, and x_t = r x_n + ν ξ, so the ratio is r²/ν² and the loss in ξ is r²/ν² times the squared error of
    E[x_n|x_t]. Capping the latter's weight at γ (Hang et al. 2023, arXiv 2303.09556, eq. 7) gives min(r²/ν², γ)/(r²/ν²);
    debiasing (Yu et al. 2024, arXiv 2310.08442) gives 1/√(r²/ν²) = ν/r. For clean data both are the published ones for ε
    prediction; whatever the network predicts, the loss is taken in ξ, so they hold for all of them. Zero at t = t_n. Where
    x_t has no signal (r = 0, zero terminal SNR), the debiased loss is (r/ν) times the squared error of E[x_n|x_t], so 0: its
    weight is 0 there.

    "balanced" is ours: the ambient loss weighs an error of ε̂ by (ν/σ_t)², next to nothing just above t_n, and everything
    below rests on those levels. min((σ_t/ν)², cap) undoes that as far as ``cap``. The target's noise grows with the weight;
    ``antithetic`` takes most of it away again. 1 for clean data; ``cap`` at t = t_n.
    """
    if weighting == "balanced":
        return schedule.ambient_scale(t_n, t).square().clamp(min=1 / cap).reciprocal()
    r, nu = schedule.transition(t_n, t)
    if weighting == "min_snr":
        # min(r²/ν², γ)/(r²/ν²) without dividing by ν, which is tiny next to t_n.
        return torch.minimum(torch.ones_like(r), gamma * (nu / r).square())
    if weighting == "debiased":
        return torch.where(r > 0, nu / torch.where(r > 0, r, 1.0), 0.0)
    return torch.ones_like(r)


def draw_times(
    schedule: NoiseSchedule, t_n: torch.Tensor, u: torch.Tensor, sampling: str, t_max: torch.Tensor | None = None
) -> torch.Tensor:
    """Times above t_n from u uniform on [0, 1): uniform, or ("near") half of them close above the noisy samples' t_n.

    "near" sends u < ½ to (2u)³ of the range and the rest to 2u − 1 of it. The ambient loss knows nothing at t_n and little
    just above it, while everything below is built on what the model says there. Clean samples have no such level.
    """
    if sampling == "near":
        u = torch.where(t_n == CLEAN, u, torch.where(u < 0.5, (2 * u) ** 3, 2 * u - 1))
    return schedule.draw_times(t_n, u, t_max)


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
    minimiser E[ε|x_t] (arXiv 2404.10177, Theorem 3.2), and for clean data the first is the plain denoising loss. At zero
    terminal SNR ε says nothing: there the second is ‖x_n − α_n x̂_0‖², its limit for r → 0.

    Args:
        x_n: (batch, …) noisy data at levels ``t_n`` (batch,), −1 for clean. t: (batch,) times above t_n.
        xi: noise like ``x_n``.
    """
    return _ambient(denoise, schedule, x_n, t_n, t, xi, loss_space)[0]


def _ambient(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_n: torch.Tensor,
    t_n: torch.Tensor,
    t: torch.Tensor,
    xi: torch.Tensor,
    loss_space: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, and x_t and the network's output (float32 at least) that it was made from."""
    t_n, t = t_n.to(x_n.device), t.to(x_n.device)
    x_t = schedule.renoise(x_n, t_n, t, xi)
    output = at_least_float32(denoise(x_t, t))
    epsilon = schedule.epsilon(output, x_t, t)
    scale = schedule.broadcast(schedule.ambient_scale(t_n, t), epsilon)
    per_sample = (xi - scale * epsilon).square().flatten(1).mean(1)
    if loss_space == "x_n":
        r, nu = schedule.transition(t_n, t)
        per_sample = per_sample * (nu / torch.where(r > 0, r, 1.0)).square().to(per_sample)
        if schedule.ends_without_signal:
            x_0 = schedule.denoised(output, x_t, t)
            blind = (x_n - schedule.broadcast(schedule.alpha(t_n), x_0) * x_0).square().flatten(1).mean(1)
            per_sample = torch.where(r.to(per_sample) > 0, per_sample, blind)
    return per_sample, x_t, output


# -- consistency ----------------------------------------------------------------------


def consistency_loss(
    denoise: Denoise,
    schedule: NoiseSchedule,
    anchor: Anchor,
    s: torch.Tensor,
    randomness: Randomness,
    options: ObjectiveOptions,
    teacher: Denoise | None = None,
) -> torch.Tensor:
    """Unbiased estimate of ‖E[h(x_s, s) | x_a] − h(x_a, a)‖² per sample, s < a: (batch,) mean over all other dimensions.

    Two independent reverse steps of the model, x_s¹ and x_s², are drawn from x_a without graph; the estimate is the mean of
    (h(x_s¹, s) − g) ⊙ (h(x_s², s) − g), which may be negative (arXiv 2404.10177, Lemma 3.4 with two samples).

    ``consistency_estimator``: with "both", gradients go through both branches. The branches are exchangeable, so the
    gradient 2 ∇(h(x_s¹) − g) · (h(x_s²) − g) with the second factor held fixed has the same mean: "single" needs no graph
    for it.
    ``consistency_stop_anchor`` holds g fixed. ``consistency_space``: the squared error of x̂_0, or ("snr") that times
    min(SNR_s, snr_gamma), which weighs differences as min-SNR-γ weighs denoising errors.

    Args:
        anchor: x_a at times a ≥ 1, and g = h(x_a, a) with its graph. s: (batch,), ≥ 0.
        teacher: the model that the reverse steps are drawn from, if another than the one trained: one more evaluation.
    """
    x_a, a = anchor.x, anchor.t
    g = anchor.mean.detach() if options.consistency_stop_anchor else anchor.mean
    with torch.no_grad():
        x_0 = g if teacher is None else posterior_mean(teacher, schedule, x_a, a)
        x_s = [schedule.reverse_step(x_a, x_0, a, s, randomness.normal(x_a)) for _ in range(2)]
    first = posterior_mean(denoise, schedule, x_s[0], s) - g
    if options.consistency_estimator == "both":
        product = first * (posterior_mean(denoise, schedule, x_s[1], s) - g)
    else:
        with torch.no_grad():
            second = posterior_mean(denoise, schedule, x_s[1], s) - g
        # The value of first · second with twice the gradient of its first factor.
        product = 2 * first * second - (first * second).detach()
    estimate = product.flatten(1).mean(1)
    if options.consistency_space == "snr":
        estimate = estimate * schedule.snr(s).clamp(max=options.snr_gamma).to(estimate)
    return estimate


def choose_anchor(
    denoise: Denoise,
    schedule: NoiseSchedule,
    known: Known,
    randomness: Randomness,
    options: ObjectiveOptions,
    sampler: Denoise,
) -> Anchor:
    """The anchor that ``consistency_anchor`` names, for every row; times are at least 1 where the row has a pair.

    "ambient" is the forward pass of the ambient loss, already paid for. "boundary" is x_n itself. "chain" is a place that
    ``sampler``'s reverse chain reaches from x_n.
    """
    if options.consistency_anchor == "ambient":
        x_a, a = known.x_t, known.t
        return Anchor(x_a, a, schedule.denoised(known.output, x_a, a.to(x_a.device)))
    x_a, a = known.x_n, known.t_n.clamp(min=1)
    if options.consistency_anchor == "chain":
        # Where clean data stand in the batch they walk from a = 1 to a = 1 and are dropped by the caller.
        start, a = a, 1 + (randomness.uniform() * a).long()
        x_a = ancestral_steps(sampler, schedule, x_a, spaced_times(start, a, options.consistency_steps), randomness)
    return Anchor(x_a, a, posterior_mean(denoise, schedule, x_a, a.to(x_a.device)))


def _consistency(
    denoise: Denoise,
    schedule: NoiseSchedule,
    known: Known,
    randomness: Randomness,
    options: ObjectiveOptions,
    teacher: Denoise | None,
) -> torch.Tensor:
    """Consistency loss (batch,) at an anchor and a time s below it that are drawn here; 0 for rows without a pair."""
    anchor = choose_anchor(denoise, schedule, known, randomness, options, teacher or denoise)
    a = anchor.t
    reach = torch.minimum(a, torch.full_like(a, options.consistency_max_step))
    s = (a - 1 - (randomness.uniform() * reach).long()).clamp(min=0)
    paired = (a >= 1) if options.consistency_anchor == "ambient" else (known.t_n >= 1)
    device = anchor.x.device
    anchor = Anchor(anchor.x, a.clamp(min=1).to(device), anchor.mean)
    values = consistency_loss(denoise, schedule, anchor, s.to(device), randomness, options, teacher)
    return torch.where(paired.to(device), values, torch.zeros_like(values))


# -- all of it ----------------------------------------------------------------------


def ambient_objective(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_n: torch.Tensor,
    t_n: torch.Tensor,
    generator: Generators = None,
    options: ObjectiveOptions | None = None,
    extra: ExtraRows | None = None,
    teacher: Denoise | None = None,
) -> Losses:
    """Draw a time above its own t_n for every sample, renoise to it, and return the losses.

    Args:
        x_n: (batch, …) noisy data; the batch may be empty where extra rows are all there is to train on.
        t_n: (batch,) its levels, −1 for clean.
        generator: one for the batch, or a list with one per sample, of the extra rows too.
        extra: rows that are trained with plain denoising at t ≤ t_max in the same forward pass.
        teacher: the averaged model, for the reverse steps of the consistency loss; None: the model itself.

    Raises:
        ValueError: some t_n leaves no level above it.
    """
    options = options or ObjectiveOptions()
    t_n, count = t_n.cpu(), len(x_n)
    x, levels, t_max = x_n, t_n, torch.full_like(t_n, schedule.num_timesteps - 1)
    if extra is not None:
        x = torch.cat([x_n, extra.x_0.to(x_n)])
        levels = torch.cat([t_n, torch.full((len(extra.x_0),), CLEAN)])
        t_max = torch.cat([t_max, extra.t_max.cpu()])
    randomness = Randomness(generator, len(x))
    u, xi = randomness.uniform(), randomness.normal(x)
    t = draw_times(schedule, levels, u, options.t_sampling, t_max)
    per_sample, x_t, output = _denoised(denoise, schedule, x, levels, t, xi, options)
    weighted = per_sample
    if options.weighting != "none":
        weight = snr_weight(schedule, levels, t, options.weighting, options.snr_gamma, options.balance_cap)
        weighted = per_sample * weight.to(per_sample)
    losses = Losses(ambient=per_sample[:count], t=t[:count], total=weighted[:count].sum() / max(1, count))
    if extra is not None:
        losses.extra, losses.name = per_sample[count:], extra.name
        losses.total = losses.total + options.restore_weight * weighted[count:].mean()
    if options.consistency_weight > 0 and count:
        n = min(count, options.consistency_batch or count)
        known = Known(x_n[:n].detach(), t_n[:n], x_t[:n].detach(), t[:n], output[:n])
        some, taught = rows_of(denoise, slice(n)), teacher and rows_of(teacher, slice(n))
        losses.consistency = _consistency(some, schedule, known, randomness.first(n), options, taught)
        losses.total = losses.total + options.consistency_weight * losses.consistency.mean()
    return losses


def _denoised(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x: torch.Tensor,
    levels: torch.Tensor,
    t: torch.Tensor,
    xi: torch.Tensor,
    options: ObjectiveOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ambient loss (batch,), x_t and the output. ``antithetic``: the loss is the mean of ξ's and −ξ's."""
    if not options.antithetic:
        return _ambient(denoise, schedule, x, levels, t, xi, options.loss_space)
    x, levels, t, xi = torch.cat([x, x]), torch.cat([levels, levels]), torch.cat([t, t]), torch.cat([xi, -xi])
    both, x_t, output = _ambient(repeated(denoise, 2), schedule, x, levels, t, xi, options.loss_space)
    return both.reshape(2, -1).mean(0), x_t, output
