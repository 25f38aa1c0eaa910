"""A small classifier that knows the noise level: is a noisy latent of the trusted or of the untrusted set?

Trained with equal parts of both sets, its best answer at a level t is p(x_t)/(p(x_t) + q(x_t)), where p and q are the
densities of noisy trusted and untrusted latents: ½ where noise has made the two alike.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.embeddings import get_timestep_embedding
from scipy.optimize import minimize
from scipy.special import expit
from torch import nn
from torch.nn import functional as F

from sdxl_ambient.noise import NoiseSchedule

WIDTH, EMBEDDING = 32, 64  # channels; size of a level's embedding
SMALLEST = 4  # the last layer's side: at high levels only what is large is left to see
WEIGHT_DECAY = 0.05
BATCH = 64  # noisy latents judged at once


# -- network ----------------------------------------------------------------------


class LevelClassifier(nn.Module):
    """Noisy latents (n, c, h, w) of any size and levels (n,) → logits (n,) of "trusted".

    Convolutions whose channels are scaled and shifted by the level (FiLM): the first one sees a latent as it is, since
    quality shows in fine detail first; each of the others halves it, until one of ``side`` is 4. The answer is linear in
    mean and standard deviation of every channel of every layer over the picture. No normalisation within: it would hide how
    much detail there is.

    ``mean`` and ``variance`` (c,) are those of clean latents; with them, inputs have mean 0 and variance 1 at every level.
    The last layer starts at 0: an untrained classifier says ½.
    """

    mean: torch.Tensor
    variance: torch.Tensor

    def __init__(self, schedule: NoiseSchedule, mean: torch.Tensor, variance: torch.Tensor, side: int):
        super().__init__()
        self.schedule = schedule
        self.register_buffer("mean", mean.float().reshape(1, -1, 1, 1))
        self.register_buffer("variance", variance.float().reshape(1, -1, 1, 1))
        self.level = nn.Sequential(nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU())
        halvings = max(0, math.ceil(math.log2(side / SMALLEST)))
        layers = [nn.Conv2d(mean.numel(), WIDTH, 3, padding=1)]
        layers += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1, stride=2) for _ in range(halvings)]
        self.layers = nn.ModuleList(layers)
        self.films = nn.ModuleList(nn.Linear(EMBEDDING, 2 * WIDTH) for _ in layers)
        self.head = nn.Linear(2 * WIDTH * len(layers), 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = self.level(get_timestep_embedding(t, EMBEDDING, flip_sin_to_cos=True, downscale_freq_shift=0))
        x, seen = self._normalised(x_t, t), []
        for layer, film in zip(self.layers, self.films, strict=True):
            scale, shift = film(level)[:, :, None, None].chunk(2, dim=1)
            x = F.silu(layer(x) * (1 + scale) + shift)
            variance, mean = torch.var_mean(x, (2, 3), correction=0)
            # The root's slope is infinite at 0, where a channel is uniform.
            seen += [mean, (variance + 1e-6).sqrt()]
        return self.head(torch.cat(seen, dim=1))[:, 0]

    def _normalised(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """(x_t − α_t μ)/√(α_t² s² + σ_t²), channel by channel."""
        alpha, sigma = (f(t).to(x_t.dtype)[:, None, None, None] for f in (self.schedule.alpha, self.schedule.sigma))
        return (x_t - alpha * self.mean) / (alpha**2 * self.variance + sigma**2).sqrt()


def moments(trusted: torch.Tensor, untrusted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of every channel, both (c,), of latents (n, c, h, w) half of which are of either set.

    A uniform channel counts as of variance 1.
    """
    sides = [torch.var_mean(x, (0, 2, 3), correction=0) for x in (trusted, untrusted)]
    (variance_0, mean_0), (variance_1, mean_1) = sides
    mean = (mean_0 + mean_1) / 2
    variance = (variance_0 + (mean_0 - mean) ** 2 + (variance_1 + (mean_1 - mean) ** 2)) / 2
    return mean, torch.where(variance > 1e-8, variance, torch.ones_like(variance))


# -- training ----------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How a classifier is trained: on levels ``lowest`` to ``highest``, both included, drawn uniformly."""

    lowest: int
    highest: int
    steps: int
    batch_size: int
    learning_rate: float


def stream(*parts: object) -> torch.Generator:
    """A generator on the CPU that follows from ``parts``, never that of a store, which has a key."""
    digest = hashlib.sha256("|".join(["sdxl_ambient annotate", *map(str, parts)]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def train_classifier(
    trusted: torch.Tensor,
    untrusted: torch.Tensor,
    schedule: NoiseSchedule,
    training: Training,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    after_step: Callable[[], None] = lambda: None,
) -> LevelClassifier:
    """Train on clean latents (n, 4, h, w) of both sets, half a batch from each, with new levels and noise in every step.

    The noise exists in memory only. All randomness comes from ``generator`` (CPU).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**48, (), generator=generator)))
        network = LevelClassifier(schedule, *moments(trusted, untrusted), min(trusted.shape[2:])).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=training.learning_rate, weight_decay=WEIGHT_DECAY)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / training.steps)))
    half = training.batch_size // 2
    labels = torch.cat([torch.ones(half), torch.zeros(half)]).to(device)
    for _ in range(training.steps):
        rows = [x[torch.randint(len(x), (half,), generator=generator)] for x in (trusted, untrusted)]
        x_0 = _mirror_half(torch.cat(rows), generator)
        t = torch.randint(training.lowest, training.highest + 1, (len(x_0),), generator=generator)
        x_t = schedule.observe(x_0, t, torch.randn(x_0.shape, generator=generator))
        loss = F.binary_cross_entropy_with_logits(network(x_t.to(device), t.to(device)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        after_step()
    return network.requires_grad_(False)


def _mirror_half(x_0: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every latent mirrored with probability ½: twice the pictures, for what is learnt from few."""
    mirror = torch.rand(len(x_0), generator=generator) < 0.5
    return torch.where(mirror[:, None, None, None], x_0.flip(-1), x_0)


# -- judging ----------------------------------------------------------------------


@torch.no_grad()
def judge(
    network: LevelClassifier, x_0: torch.Tensor, levels: Sequence[int], noises: Sequence[torch.Generator], draws: int
) -> np.ndarray:
    """Logits of "trusted" of a clean latent (4, h, w) under ``draws`` noises at every level: (levels, draws), float64.

    ``noises`` has a stream for each level, so that an image's noises are the same in any set.
    """
    z = torch.cat([torch.randn((draws, *x_0.shape), generator=generator) for generator in noises])
    t = torch.tensor(levels).repeat_interleave(draws)
    x_t = network.schedule.observe(x_0.expand_as(z), t, z)
    device = network.mean.device
    parts = [network(x.to(device), s.to(device)) for x, s in zip(x_t.split(BATCH), t.split(BATCH), strict=True)]
    return torch.cat(parts).double().cpu().numpy().reshape(len(levels), draws)


def calibrate(trusted: np.ndarray, untrusted: np.ndarray) -> tuple[float, float]:
    """Slope a ≥ 0 and shift b for which expit(a · logit + b) is a probability, from held-out logits (n, draws) of one level.

    Platt's scaling (1999) with smoothed targets, 1/(n + 2) and its complement for the smaller set's n, and both sets of
    equal weight, so that their mean probabilities average ½. A network that is sure of itself on images that it can't tell
    apart gets a = 0.
    """
    doubt = 1 / (min(len(trusted), len(untrusted)) + 2)
    sides = ((trusted, 1 - doubt), (untrusted, doubt))
    scale = max(1e-12, float(np.std(np.concatenate([trusted.ravel(), untrusted.ravel()]))))

    def loss(ab: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = 0.0, np.zeros(2)
        for logits, target in sides:
            x = logits / scale
            y = ab[0] * x + ab[1]
            value += np.mean(np.logaddexp(0, y) - target * y)
            error = expit(y) - target
            gradient += np.mean(error * x), np.mean(error)
        return value, gradient

    a, b = minimize(loss, (1.0, 0.0), jac=True, method="L-BFGS-B", bounds=((0, None), (None, None))).x
    return float(a) / scale, float(b)
