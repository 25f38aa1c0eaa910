"""The noise-level algebra of ambient diffusion: variance preserving, discrete time, pure torch.

Notation (docs/METHOD.md): ᾱ_t = ``alphas_cumprod[t]`` is the schedule of the base model's own scheduler, α_t = √ᾱ_t the
signal and σ_t = √(1 − ᾱ_t) the noise. t_n is the noise level of the *data*, per sample; inside tensors −1 stands for clean
(ᾱ = 1), outside None does. Times are integer tensors of shape (batch,); samples have shape (batch, …).

Coefficients are made in float64 and rounded once, to float64 for float64 samples and to float32 for all others, so that no
noise level is ever rounded to half precision. α_t and σ_t alone are made in float32 for float32 samples, as diffusers makes
them: on clean data every number is then bit for bit that of ``DDPMScheduler.add_noise`` and the plain denoising loss.

Source: Daras, Dimakis and Daskalakis, "Consistent Diffusion Meets Tweedie", arXiv 2404.10177, Theorem 3.2 (double Tweedie).
"""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import torch

from sdxl_ambient.levels import CLEAN, PREDICTION_TYPES


class Scheduler(Protocol):
    """What is read of a scheduler of diffusers: ᾱ of every timestep (T,), and what the network predicts."""

    alphas_cumprod: torch.Tensor
    config: Any  # a mapping whose entries are attributes too, ``prediction_type`` among them


def levels(t_n: int | None | torch.Tensor, batch: int, device: torch.device | str | None = None) -> torch.Tensor:
    """One noise level for each sample: an int, None (clean) or a (batch,) tensor becomes an int64 tensor (batch,)."""
    if isinstance(t_n, torch.Tensor):
        if t_n.shape != (batch,):
            raise ValueError(f"t_n has shape {tuple(t_n.shape)}, one level per sample is ({batch},)")
        return t_n.to(device=device, dtype=torch.int64)
    return torch.full((batch,), CLEAN if t_n is None else t_n, dtype=torch.int64, device=device)


def _listed(t: torch.Tensor) -> list[int]:
    """Times as a message shows them."""
    return [int(value) for value in t.flatten()]


class NoiseSchedule:
    """ᾱ_0 … ᾱ_{T−1} of a diffusion model, what its network predicts, and every conversion between noise levels.

    Args:
        alphas_cumprod: (T,) tensor, strictly decreasing within [0, 1].
        prediction_type: "epsilon", "v_prediction" or "sample", as diffusers names them.

    Raises:
        ValueError: a schedule that isn't decreasing, or predicts ε where there is no signal left (zero terminal SNR).
    """

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str = "epsilon"):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type: {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")
        bar = alphas_cumprod.detach().cpu()
        if bar.ndim != 1 or not bool(torch.isfinite(bar).all()):
            raise ValueError("alphas_cumprod must be a finite tensor of one dimension")
        if bar[0] > 1 or bar[-1] < 0 or not bool((bar[1:] < bar[:-1]).all()):
            raise ValueError("alphas_cumprod must decrease strictly from at most 1 to at least 0")
        if prediction_type == "epsilon" and bar[-1] == 0:
            raise ValueError("ε prediction is undefined at zero terminal SNR; use v_prediction or sample")
        self.prediction_type = prediction_type
        self.num_timesteps = len(bar)
        # Row T, which index −1 reaches, is clean data.
        self._bar = torch.cat([bar.double(), torch.ones(1, dtype=torch.float64)])
        bar32 = torch.cat([bar.float(), torch.ones(1)])
        # By name, and by name and device: each table goes to a device once.
        self._made = {"bar": self._bar, "alpha32": bar32**0.5, "sigma32": (1 - bar32) ** 0.5}
        self._tables: dict[tuple[str, torch.device], torch.Tensor] = {}

    @classmethod
    def from_scheduler(cls, scheduler: Scheduler) -> NoiseSchedule:
        """The schedule of any diffusers scheduler that has ``alphas_cumprod`` (DDPM, DDIM, Euler, DPM++, …)."""
        return cls(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    @property
    def hash(self) -> str:
        """SHA-256 of ᾱ; identifies the schedule in manifests."""
        return hashlib.sha256(self._bar.numpy().tobytes()).hexdigest()

    @property
    def ends_without_signal(self) -> bool:
        """Whether x_T has no signal: zero terminal SNR (Lin et al. 2024, arXiv 2305.08891)."""
        return float(self._bar[self.num_timesteps - 1]) == 0

    # -- coefficients ------------------------------------------------------------------

    def alpha_bar(self, t: torch.Tensor) -> torch.Tensor:
        """ᾱ_t, float64, shape of ``t``; 1 where t = −1."""
        return self._table("bar", t.device)[self._checked(t)]

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """Signal α_t = √ᾱ_t, float64, shape of ``t``; 1 where t = −1."""
        return self.alpha_bar(t).sqrt()

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Noise σ_t = √(1 − ᾱ_t), float64, shape of ``t``; 0 where t = −1. (Not σ/α, as samplers have it.)"""
        return (1 - self.alpha_bar(t)).sqrt()

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio ᾱ_t / (1 − ᾱ_t), float64, shape of ``t``."""
        bar = self.alpha_bar(t)
        return bar / (1 - bar)

    def transition(self, t_n: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """r = α_t/α_n and ν = √(1 − ᾱ_t/ᾱ_n) of x_t = r x_n + ν ξ; float64, shape of ``t``. ν = 0 at t = t_n.

        Raises:
            ValueError: some t is below its t_n, where no noise can be added.
        """
        bar_n, bar_t = self.alpha_bar(t_n), self.alpha_bar(t)
        # Comparing on an accelerator would make it wait in every step; there the times were drawn on the CPU and checked.
        if t.device.type == "cpu" and bool((bar_t > bar_n).any()):
            raise ValueError(f"times {_listed(t)} are not all at or above the data's levels {_listed(t_n)}")
        # (ᾱ_n − ᾱ_t)/ᾱ_n, not 1 − ratio: exact to the last bit next to t_n.
        return (bar_t / bar_n).sqrt(), ((bar_n - bar_t) / bar_n).sqrt()

    # -- the forward process ------------------------------------------------------------------

    def observe(self, x_0: torch.Tensor, t_n: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """x_n = α_n x_0 + σ_n z: the one noisy observation of clean data; ``x_0`` itself where t_n = −1."""
        return self._alpha_like(t_n, x_0) * x_0 + self._sigma_like(t_n, x_0) * z

    def renoise(self, x_n: torch.Tensor, t_n: torch.Tensor, t: torch.Tensor, xi: torch.Tensor) -> torch.Tensor:
        """x_t = r x_n + ν ξ for t ≥ t_n: distributed as x_t given x_0, though no clean sample is used."""
        r, nu = self.transition(t_n, t)
        # On clean data these are α_t and σ_t themselves, bit for bit.
        clean = self.broadcast(t_n == CLEAN, x_n).bool()
        r = torch.where(clean, self._alpha_like(t, x_n), self.broadcast(r, x_n))
        nu = torch.where(clean, self._sigma_like(t, x_n), self.broadcast(nu, x_n))
        return r * x_n + nu * xi

    def ambient_scale(self, t_n: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """ν/σ_t, float64, shape of ``t``: in [0, 1]; exactly 1 for clean data, 0 at t = t_n."""
        _, nu = self.transition(t_n, t)
        return torch.where(t_n == CLEAN, torch.ones_like(nu), nu / self.sigma(t))

    # -- what the network says ------------------------------------------------------------------

    def epsilon(self, model_output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """ε̂ from the network's output, whatever it predicts: v = α ε − σ x_0, sample = x_0."""
        if self.prediction_type == "epsilon":
            return model_output
        alpha, sigma = self.broadcast(self.alpha(t), x_t), self._sigma_like(t, x_t)
        if self.prediction_type == "v_prediction":
            return alpha * model_output + sigma * x_t
        return (x_t - alpha * model_output) / sigma

    def x_0(self, epsilon: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x̂_0 = (x_t − σ_t ε̂)/α_t (Tweedie). Not defined at zero terminal SNR: there use :meth:`denoised`."""
        return (x_t - self._sigma_like(t, x_t) * epsilon) / self.broadcast(self.alpha(t), x_t)

    def denoised(self, model_output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x̂_0 straight from the network's output; defined at every t for v_prediction and sample."""
        if self.prediction_type == "epsilon":
            return self.x_0(model_output, x_t, t)
        if self.prediction_type == "v_prediction":
            return self.broadcast(self.alpha(t), x_t) * x_t - self._sigma_like(t, x_t) * model_output
        return model_output

    def expected_x_n(self, epsilon: torch.Tensor, x_t: torch.Tensor, t_n: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """E[x_n | x_t] = (x_t − (ν²/σ_t) ε̂)/r (double Tweedie, arXiv 2404.10177 eq. 3.3), for t ≥ t_n."""
        r, nu = self.transition(t_n, t)
        step = self.broadcast(nu * self.ambient_scale(t_n, t), x_t)
        return (x_t - step * epsilon) / self.broadcast(r, x_t)

    # -- the reverse process ------------------------------------------------------------------

    def reverse_step(
        self, x_t: torch.Tensor, x_0: torch.Tensor, t: torch.Tensor, s: torch.Tensor, z: torch.Tensor
    ) -> torch.Tensor:
        """One draw of x_s given x_t and x_0, s < t: the DDPM posterior (Ho et al. 2020 eq. 7; DDIM with η = 1).

        With x_0 = E[x_0|x_t] it is a reverse step of the model, exact only for small t − s. s = −1 gives ``x_0``.
        """
        r, nu = self.transition(s, t)
        variance_t, variance_s = 1 - self.alpha_bar(t), 1 - self.alpha_bar(s)
        keep = self.broadcast(r * variance_s / variance_t, x_t)
        pull = self.broadcast(self.alpha(s) * nu**2 / variance_t, x_t)
        spread = self.broadcast((variance_s / variance_t).sqrt() * nu, x_t)
        return keep * x_t + pull * x_0 + spread * z

    # -- drawing times ------------------------------------------------------------------

    def draw_times(self, t_n: torch.Tensor, u: torch.Tensor, t_max: torch.Tensor | None = None) -> torch.Tensor:
        """t uniform on {t_n + 1, …, t_max} from u uniform on [0, 1). t_n itself carries no information and is never drawn.

        ``t_max`` (batch,) is T − 1 unless given.

        Raises:
            ValueError: some t_n leaves no level above it, or some t_max is beyond the schedule.
        """
        last = self.num_timesteps - 1
        if bool((t_n >= last).any()) or bool((t_n < CLEAN).any()):
            raise ValueError(f"t_n {_listed(t_n)} must lie between {CLEAN} (clean) and {last - 1}")
        t_max = torch.full_like(t_n, last) if t_max is None else t_max
        if bool((t_max > last).any()) or bool((t_max <= t_n).any()):
            raise ValueError(f"t_max {_listed(t_max)} must lie above t_n {_listed(t_n)}, up to {last}")
        above = t_max - t_n
        return t_n + 1 + torch.minimum((u * above).long(), above - 1)

    # -- tables ------------------------------------------------------------------

    def _table(self, name: str, device: torch.device) -> torch.Tensor:
        if (name, device) not in self._tables:
            self._tables[name, device] = self._made[name].to(device)
        return self._tables[name, device]

    def _checked(self, t: torch.Tensor) -> torch.Tensor:
        if t.dtype.is_floating_point or t.dtype == torch.bool:
            raise ValueError(f"times must be whole numbers, not {t.dtype}")
        if t.device.type == "cpu" and t.numel() and not (CLEAN <= int(t.min()) and int(t.max()) < self.num_timesteps):
            raise ValueError(f"times {_listed(t)} must lie between {CLEAN} (clean) and {self.num_timesteps - 1}")
        return t.long()

    @staticmethod
    def broadcast(coefficient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """(batch,) float64 → (batch, 1, …) in float64 or float32, ready to multiply ``x``."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return coefficient.to(x.device, dtype).reshape(-1, *[1] * (x.ndim - 1))

    def _alpha_like(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64:
            return self.broadcast(self.alpha(t), x)
        return self.broadcast(self._table("alpha32", t.device)[self._checked(t)], x)

    def _sigma_like(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64:
            return self.broadcast(self.sigma(t), x)
        return self.broadcast(self._table("sigma32", t.device)[self._checked(t)], x)
