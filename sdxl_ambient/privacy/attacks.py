"""Attacks on noisy latents: reconstruction by a linear filter or a model, and identification among known pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from sdxl_ambient.devices import DTYPES, Placement, one_process, resolve_device
from sdxl_ambient.errors import PrivacyError
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.models.denoiser import Denoiser
from sdxl_ambient.models.load import check_sdxl, load_encoders, load_unet
from sdxl_ambient.models.vae import check_resolution, load_vae
from sdxl_ambient.noise import NoiseSchedule, levels
from sdxl_ambient.privacy import accounting
from sdxl_ambient.privacy.options import PrivacyOptions
from sdxl_ambient.privacy.wiener import LinearFilter, choose_weight
from sdxl_ambient.probe import (
    ProbedImage,
    choose,
    compare,
    decode_latent,
    denoise,
    encode_candidates,
    preview_generator,
    tell,
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


def collect(options: PrivacyOptions, vae, log) -> Attacked:
    """Read and encode the images, and the references that are not among them.

    Raises:
        ImagesMissing, ImageError: no usable image.
        PrivacyError: fewer than four references.
    """
    state = one_process(resolve_device(options.device))
    pictures, indices = choose(options, state, log)
    other = replace(
        options,
        train_data_dir=options.reference_data_dir,
        caption=False,
        num_candidates=options.num_references,
        num_images=1,
    )
    known = {p.content for p in pictures}
    references = [p for p in choose(other, state, log)[0] if p.content not in known]
    if len(references) < 4:
        raise PrivacyError(
            f"--reference_data_dir: {options.reference_data_dir!r} holds {len(references)} usable images that are not in "
            "--train_data_dir; at least 4 are needed"
        )
    geometry = Geometry(options.resolution, options.center_crop)
    x_0, shown = encode_candidates(pictures, indices, vae, geometry)
    return Attacked(pictures, x_0, shown, encode_candidates(references, [], vae, geometry)[0])


def reconstruct(options: PrivacyOptions, schedule: NoiseSchedule, found: Attacked, unet) -> list[tuple]:
    """(level, image, way, latent) of everything an attacker makes, of each image and level; ``unet`` may be None."""
    made = []
    with tqdm(total=len(options.t_n) * len(found.shown), desc="reconstructing", unit="image", mininterval=1) as bar:
        for t in options.t_n:
            bar.set_postfix(t_n=t)
            alpha, sigma = coefficients(schedule, t)
            linear = LinearFilter(found.references, choose_weight(found.references, alpha, sigma, options.seed))
            for image in found.shown:
                x_n = found.observe(schedule, image, t, options.seed)
                made.append((t, image, "noisy", x_n))
                made.append((t, image, "linear", linear(x_n[None], alpha, sigma)[0]))
                if unet is not None:
                    mean, samples = by_model(options, schedule, unet, image, x_n, t)
                    made += [(t, image, "denoised", mean), *((t, image, "sample", x) for x in samples)]
                bar.update()
    return made


def by_model(
    options: PrivacyOptions, schedule: NoiseSchedule, unet, image: ProbedImage, x_n: torch.Tensor, t: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """E[x_0|x_n] and posterior samples by the base model, which is told the image's conditioning."""
    names = [f"privacy sample {k}" for k in range(options.posterior_samples)]
    generators = [preview_generator(options.seed, image.picture.content, t, name) for name in names]
    dtype = DTYPES[options.dtype]
    conditioning = image.conditioning.rows([0] * max(1, len(names))).to(unet.device, dtype)
    return denoise(Denoiser(unet, conditioning, dtype), schedule, x_n.to(unet.device), t, options.steps, generators)


def score(made: Sequence[tuple], found: Attacked, vae) -> tuple[dict, dict]:
    """Mean similarity to the clean pictures: of the ceiling and of a constant guess; and by level and way."""
    constant = found.references.mean(0)
    fixed = {"vae_round_trip": [], "reference_mean": []}
    for image in found.shown:
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


def identify(options: PrivacyOptions, schedule: NoiseSchedule, found: Attacked) -> dict[int, dict]:
    """:func:`identification` of all images among themselves and the references, by level."""
    candidates = torch.cat([found.x_0, found.references]).double().flatten(1)
    rates = {}
    for t in tqdm(options.t_n, desc="identifying", unit="level"):

        def draw(i: int, t=t) -> torch.Tensor:
            return found.noise(options.seed, i, t, options.draws).flatten(1)

        rates[t] = identification(candidates, len(found.x_0), *coefficients(schedule, t), draw)
    return rates


def measure(options: PrivacyOptions, schedule: NoiseSchedule, log) -> tuple[dict, dict[int, dict], dict[str, float]]:
    """What holds for the set; what holds for it at each level; and norms of its latents."""
    base, device = options.pretrained_model_name_or_path, resolve_device(options.device)
    place, dtype = Placement(device), DTYPES[options.dtype]
    weights = dict(revision=options.revision, variant=options.variant)
    if options.use_unet:
        encoders = load_encoders(base, vae=options.pretrained_vae_model_name_or_path, text_dtype=dtype, **weights)
        vae = encoders.vae
    else:
        vae = load_vae(base, options.pretrained_vae_model_name_or_path, **weights)
    check_resolution(options.resolution, vae)
    found, unet = collect(options, place.use(vae), log), None
    if options.use_unet:
        zeros = check_sdxl(base, options.revision).get("force_zeros_for_empty_prompt", True)
        tell(found.shown, encoders, options.caption, zeros, place)
        del encoders  # the text encoders are out of memory from here on
        unet = load_unet(base, dtype=dtype, **weights).eval().requires_grad_(False)
    rates = identify(options, schedule, found)
    made = reconstruct(options, schedule, found, None if unet is None else place.use(unet))
    fixed, ways = score(made, found, place.use(vae))
    about = {
        "images": len(found.x_0),
        "reconstructed": len(found.shown),
        "references": len(found.references),
        "candidates": len(found.x_0) + len(found.references),
        "dimension": found.x_0[0].numel(),
        "reconstruction": fixed,
    }
    by_level = {t: {"reconstruction": ways[t], "identification": rates[t]} for t in options.t_n}
    return about, by_level, norm_quantiles(found.x_0)
