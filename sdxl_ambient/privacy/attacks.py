"""Attacks on noisy latents: reconstruction by a linear filter or a model, and identification among known pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from sdxl_ambient.devices import DTYPES, Placement, one_process, resolve_device
from sdxl_ambient.errors import PrivacyError
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.images.sources import Log
from sdxl_ambient.models.base import check_sdxl
from sdxl_ambient.models.denoiser import Denoiser
from sdxl_ambient.models.load import load_encoders, load_unet
from sdxl_ambient.models.prediction import check_prediction
from sdxl_ambient.models.vae import check_resolution, load_vae
from sdxl_ambient.noise import NoiseSchedule, levels
from sdxl_ambient.privacy import accounting
from sdxl_ambient.privacy.settings import PrivacySettings
from sdxl_ambient.privacy.wiener import LinearFilter, choose_weight
from sdxl_ambient.probe import (
    ProbedImage,
    add_conditioning,
    choose,
    compare,
    decode_latent,
    denoise,
    encode_candidates,
    preview_generator,
)
from sdxl_ambient.store.scan import Scanned


def norm_quantiles(x_0: torch.Tensor) -> dict[str, float]:
    """Largest norm and quantiles of latents (n, 4, h, w)."""
    norms = x_0.double().flatten(1).norm(dim=1).numpy()
    return {"data_max": float(norms.max()), **{f"data_q{q:02d}": float(np.quantile(norms, q / 100)) for q in (50, 5)}}


def identification(
    candidates: torch.Tensor, count: int, alpha: float, sigma: float, draw: Callable[[int], torch.Tensor]
) -> dict:
    """Look for each of the first ``count`` candidates among all (n, d), by likelihood, and tell it from each other one.

    Args:
        candidates: clean latents, float64.
        draw: index → noise (draws, d), one row per observation.

    Given x_n = α x_i + σ z, the nearest α x_j is the likeliest. With w = x_j − x_i, x_j is nearer than x_i where
    2σ z·w > α‖w‖², which has the probability Φ(−α‖w‖/(2σ)). Their sum over j bounds the rate of misses.
    """
    missed, confused, expected = [], [], []
    for i in range(count):
        toward = torch.cat([candidates[:i], candidates[i + 1 :]]) - candidates[i]  # to the n − 1 others
        squares = toward.square().sum(1)
        nearer = 2 * sigma * draw(i).double() @ toward.T > alpha * squares  # (draws, n − 1)
        missed.append(nearer.any(1).double().mean())
        confused.append(nearer.double().mean())
        expected.append(accounting.pair_error(squares.sqrt().numpy(), (alpha / sigma) ** 2))
    return {
        "rate": 1 - float(torch.stack(missed).mean()),
        "rate_bound": max(0.0, 1 - float(np.mean([e.sum() for e in expected]))),
        "chance": 1 / len(candidates),
        "pair_error": float(torch.stack(confused).mean()),
        "pair_error_expected": float(np.mean(expected)),
        "nearest_pair_error_expected": float(np.mean([e.max() for e in expected])),
    }


@dataclass
class Attacked:
    """The images under attack: those looked for, their latents (n, 4, h, w), those reconstructed, and the references'."""

    pictures: Sequence[Scanned]
    x_0: torch.Tensor
    shown: list[ProbedImage]
    references: torch.Tensor

    def noise(self, seed: int, i: int, t: int, draws: int) -> torch.Tensor:
        """z (draws, 4, h, w) of an image at a level; draw k is the same for any number of them."""
        streams = [preview_generator(seed, self.pictures[i].content, t, f"privacy {k}") for k in range(draws)]
        return torch.stack([torch.randn(self.x_0[i].shape, generator=g) for g in streams])

    def observe(self, schedule: NoiseSchedule, shown: ProbedImage, t: int, seed: int) -> torch.Tensor:
        """x_n (4, h, w), float32: the first draw of an image that is reconstructed."""
        return schedule.observe(shown.x_0[None], levels(t, 1), self.noise(seed, shown.index, t, 1))[0]


def collect(settings: PrivacySettings, vae: AutoencoderKL, log: Log) -> Attacked:
    """Read and encode the images, and the references that are not among them.

    Raises:
        ImagesMissing, ImageError: no usable image.
        PrivacyError: fewer than four references.
    """
    state = one_process(resolve_device(settings.device))
    pictures, indices = choose(settings.attacked, state, log)
    known = {p.content for p in pictures}
    references = [p for p in choose(settings.references, state, log)[0] if p.content not in known]
    if len(references) < 4:
        raise PrivacyError(
            f"--reference_data_dir: {settings.reference_data_dir!r} holds {len(references)} usable images that are not in "
            "--train_data_dir; at least 4 are needed"
        )
    geometry = Geometry(settings.resolution, settings.center_crop)
    x_0, shown = encode_candidates(pictures, indices, vae, geometry)
    return Attacked(pictures, x_0, shown, encode_candidates(references, [], vae, geometry)[0])


def reconstruct(settings: PrivacySettings, schedule: NoiseSchedule, attacked: Attacked, unet) -> list[tuple]:
    """(level, image, way, latent) of everything an attacker makes, of each image and level; ``unet`` may be None."""
    made = []
    with tqdm(total=len(settings.t_n) * len(attacked.shown), desc="reconstructing", unit="image", mininterval=1) as bar:
        for t in settings.t_n:
            bar.set_postfix(t_n=t)
            alpha, sigma = coefficients(schedule, t)
            linear = LinearFilter(attacked.references, choose_weight(attacked.references, alpha, sigma, settings.seed))
            for image in attacked.shown:
                x_n = attacked.observe(schedule, image, t, settings.seed)
                made.append((t, image, "noisy", x_n))
                made.append((t, image, "linear", linear(x_n[None], alpha, sigma)[0]))
                if unet is not None:
                    mean, samples = by_model(settings, schedule, unet, image, x_n, t)
                    made += [(t, image, "denoised", mean), *((t, image, "sample", x) for x in samples)]
                bar.update()
    return made


def by_model(
    settings: PrivacySettings, schedule: NoiseSchedule, unet, image: ProbedImage, x_n: torch.Tensor, t: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """E[x_0|x_n] and posterior samples by the base model, which gets the image's conditioning."""
    names = [f"privacy sample {k}" for k in range(settings.posterior_samples)]
    generators = [preview_generator(settings.seed, image.picture.content, t, name) for name in names]
    dtype = DTYPES[settings.dtype]
    network = Denoiser(unet, image.repeated(len(names), unet.device, dtype), dtype)
    return denoise(network, schedule, x_n.to(unet.device), t, settings.steps, generators)


def score(made: Sequence[tuple], attacked: Attacked, vae) -> tuple[dict, dict]:
    """Mean similarity to the clean pictures: of the ceiling and of a constant guess; and by level and way."""
    constant = attacked.references.mean(0)
    fixed = {"vae_round_trip": [], "reference_mean": []}
    for image in attacked.shown:
        for name, latent in (("vae_round_trip", image.x_0), ("reference_mean", constant)):
            fixed[name].append(compare(decode_latent(vae, latent), image.square))
    ways: dict[int, dict[str, list]] = {}
    for t, image, way, latent in tqdm(made, desc="decoding", unit="picture", mininterval=1):
        ways.setdefault(t, {}).setdefault(way, []).append(compare(decode_latent(vae, latent), image.square))
    return _means(fixed), {t: _means(by_way) for t, by_way in ways.items()}


def _means(rows: dict[str, list[dict]]) -> dict:
    return {way: {name: float(np.mean([r[name] for r in some])) for name in some[0]} for way, some in rows.items()}


def coefficients(schedule: NoiseSchedule, t: int) -> tuple[float, float]:
    """α_n and σ_n."""
    level = torch.tensor([t])
    return float(schedule.alpha(level)), float(schedule.sigma(level))


def identify(settings: PrivacySettings, schedule: NoiseSchedule, attacked: Attacked) -> dict[int, dict]:
    """:func:`identification` of all images among themselves and the references, by level."""
    candidates = torch.cat([attacked.x_0, attacked.references]).double().flatten(1)
    rates = {}
    for t in tqdm(settings.t_n, desc="identifying", unit="level"):

        def draw(i: int, t=t) -> torch.Tensor:
            return attacked.noise(settings.seed, i, t, settings.draws).flatten(1)

        rates[t] = identification(candidates, len(attacked.x_0), *coefficients(schedule, t), draw)
    return rates


def measure(settings: PrivacySettings, schedule: NoiseSchedule, log: Log) -> tuple[dict, dict[int, dict], dict[str, float]]:
    """What holds for the set; what holds for it at each level; and norms of its latents."""
    base, device = settings.pretrained_model_name_or_path, resolve_device(settings.device)
    place, dtype = Placement(device), DTYPES[settings.dtype]
    vae_path, revision, variant = settings.pretrained_vae_model_name_or_path, settings.revision, settings.variant
    unet = encoders = None
    if settings.use_unet:
        encoders = load_encoders(base, vae=vae_path, text_dtype=dtype, revision=revision, variant=variant)
    vae = load_vae(base, vae_path, revision=revision, variant=variant) if encoders is None else encoders.vae
    check_resolution(settings.resolution, vae)
    attacked = collect(settings, place.use(vae), log)
    if encoders is not None:
        index = check_sdxl(base, revision, prediction_type=settings.prediction_type)
        zeros = index.get("force_zeros_for_empty_prompt", True)
        add_conditioning(attacked.shown, encoders, settings.caption, zeros, place)
        encoders = None  # the text encoders are out of memory from here on
        unet = load_unet(base, dtype=dtype, revision=revision, variant=variant).eval().requires_grad_(False)
        check_prediction(place.use(unet), schedule, repr(base), settings.prediction_type)
    rates = identify(settings, schedule, attacked)
    made = reconstruct(settings, schedule, attacked, None if unet is None else place.use(unet))
    fixed, ways = score(made, attacked, place.use(vae))
    about = {
        "images": len(attacked.x_0),
        "reconstructed": len(attacked.shown),
        "references": len(attacked.references),
        "candidates": len(attacked.x_0) + len(attacked.references),
        "dimension": attacked.x_0[0].numel(),
        "reconstruction": fixed,
    }
    by_level = {t: {"reconstruction": ways[t], "identification": rates[t]} for t in settings.t_n}
    return about, by_level, norm_quantiles(attacked.x_0)
