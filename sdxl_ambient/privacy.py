r"""What whoever takes a store of noisy latents can do with it, measured and in closed form.

    python -m sdxl_ambient.privacy --pretrained_model_name_or_path BASE --train_data_dir DIR --reference_data_dir OTHER \
        --t_n 100 300 500 800 --output_file privacy.json

    reconstruction    pictures from x_n: by the best linear filter, its covariance from OTHER images, and by the base model
    identification    which of N known pictures x_n was made of
    observations      what several independent draws of a picture amount to
    zcdp              the differential privacy of one draw, if latents were clipped (which training doesn't do)

Without ``--train_data_dir``, the last two alone. Figures only are written, no picture and no latent. The noise is its own,
made from ``--seed``; no noise key is read. docs/PRIVACY.md says how to read the figures.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sdxl_ambient import accounting
from sdxl_ambient.config import OptionError, option, parse_options
from sdxl_ambient.geometry import Geometry
from sdxl_ambient.images import ImageError, ImagesMissing
from sdxl_ambient.latents import check_resolution
from sdxl_ambient.manifest import read_json, versions, write_json
from sdxl_ambient.models import Denoiser, ModelError, check_sdxl, load_encoders, load_schedule, load_unet, load_vae
from sdxl_ambient.noise import NoiseSchedule, levels
from sdxl_ambient.options import MAXIMUM_T_N, ModelOptions, check_writable
from sdxl_ambient.plan import Scanned, restored_levels, spoken_levels
from sdxl_ambient.preview import (
    DTYPES,
    Placement,
    PreviewError,
    Shown,
    check_device,
    check_levels,
    choose,
    compare,
    decode_latent,
    denoise,
    encode_candidates,
    one_process,
    preview_generator,
    resolve_device,
    tell,
)

OBSERVATIONS = (1, 2, 4, 10, 100)  # numbers of draws that figures are given for
TARGET_EPSILON = 8.0  # about the largest that is used where differential privacy is claimed
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the stationary covariance beside that of the reference images
NOTE = (
    "No differential privacy is claimed: training clips no latent, and at these levels epsilon would mean nothing if it "
    "did. A clip norm taken from private data is itself not private."
)


class PrivacyError(ValueError):
    """Images or a file that can't be used. The message is one line that says why."""


# -- options ----------------------------------------------------------------------


@dataclass
class PrivacyOptions(ModelOptions):
    """``python -m sdxl_ambient.privacy``."""

    train_data_dir: str | None = option(None, "folder of the images that are attacked; without it closed forms alone")
    reference_data_dir: str | None = option(
        None, "folder of other images: what an attacker knows of pictures in general, and the wrong candidates"
    )
    caption_column: str = option("text", "the column of metadata.jsonl that holds the captions")
    instance_prompt: str | None = option(None, "caption for images that have none; without it they are skipped")
    caption: bool = option(True, "tell the model each image's caption, as whoever has them would; false tells it none")
    resolution: int = option(1024, "side of the square that images are resized and cropped to, pixels", minimum=16)
    center_crop: bool = option(True, "crop the middle; if false, the place that a store would take")
    t_n: list[int] = option([100, 300, 500, 800], "noise levels, timesteps", minimum=0, maximum=MAXIMUM_T_N)
    num_images: int = option(8, "images that are reconstructed, evenly from the set", minimum=1)
    num_candidates: int = option(256, "images of the set that are looked for, at most", minimum=1)
    num_references: int = option(256, "reference images used, at most", minimum=4)
    draws: int = option(4, "observations that each image is looked for with", minimum=1)
    use_unet: bool = option(True, "also reconstruct with the base model; false: linear filter and identification alone")
    posterior_samples: int = option(2, "samples by the reverse chain, per image and level", minimum=0, maximum=16)
    steps: int = option(25, "evaluations of the chain that draws one", minimum=1)
    dimension: int = option(4 * 128 * 128, "numbers in a latent, for the closed forms [SDXL at 1024 pixels]", minimum=1)
    clip_norm: float | None = option(None, "also account for latents clipped to this norm", above=0)
    delta: float = option(1e-5, "δ of (ε, δ)-differential privacy, below 1", above=0)
    seed: int = option(0, "the noise follows from this, the level and the image", minimum=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, …")
    dtype: str = option("float32", "precision of UNet and text encoders", choices=tuple(DTYPES))
    output_file: str | None = option(None, "JSON file for the figures; without it they are printed")

    def validate(self) -> None:
        super().validate()
        check_levels(self.t_n)
        if self.delta >= 1:
            raise OptionError(f"--delta: {self.delta} is not below 1")
        self._validate_folders()
        check_device(self.device)
        if self.output_file:
            check_output(self.output_file)

    def _validate_folders(self) -> None:
        for name in ("train_data_dir", "reference_data_dir"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                raise OptionError(f"--{name}: {folder!r} is not a folder")
            if folder is not None and (observed := restored_levels(Path(folder))) is not None:
                raise OptionError(
                    f"--{name}: {folder!r} is a store of restored samples, which are no observations; what protects their "
                    f"images is the noise of the observations behind them: give the images and --t_n "
                    f"{spoken_levels(observed.values())}"
                )
        if (self.train_data_dir is None) != (self.reference_data_dir is None):
            raise OptionError("--reference_data_dir: goes with --train_data_dir; allowed are both or neither")
        if self.train_data_dir and Path(self.train_data_dir).resolve() == Path(self.reference_data_dir).resolve():
            raise OptionError(
                f"--reference_data_dir: {self.reference_data_dir!r} is --train_data_dir; allowed is a folder of other images"
            )


def check_output(file: str) -> None:
    """A file that can be written and is not another program's; an OptionError else."""
    path = Path(file)
    if path.is_dir():
        raise OptionError(f"--output_file: {file!r} is a folder, a file is needed")
    check_writable("output_file", str(path.parent))
    try:
        if path.exists() and "zcdp" not in read_json(path):
            raise ValueError
    except (OSError, ValueError, TypeError):
        raise OptionError(
            f"--output_file: {file!r} holds something else; allowed is a new file, or one of this program's"
        ) from None


# -- closed forms ----------------------------------------------------------------------


def closed_forms(options: PrivacyOptions, schedule: NoiseSchedule, t: int, norms: dict[str, float]) -> dict:
    """What needs no picture at a level; ``norms`` are the clip norms to account for, by where they come from."""
    signal, (alpha, sigma) = accounting.snr(schedule, t), coefficients(schedule, t)
    return {
        "alpha": alpha,
        "sigma": sigma,
        "snr": signal,
        "observations": {str(k): accounting.effective_level(schedule, t, k) for k in OBSERVATIONS},
        "distance_for_5_percent_error": accounting.distance_for_error(0.05, signal),
        "zcdp": {name: zcdp(norm, signal, options.delta) for name, norm in norms.items()},
    }


def zcdp(clip_norm: float, signal: float, delta: float) -> dict:
    """ρ and ε of one observation and of several, at a clip norm C and an SNR."""
    found = {str(k): accounting.rho(clip_norm, signal, k) for k in OBSERVATIONS}
    return {
        "clip_norm": clip_norm,
        "rho": found,
        "epsilon": {k: accounting.epsilon(rho, delta) for k, rho in found.items()},
    }


def accounted(options: PrivacyOptions, schedule: NoiseSchedule, norms: dict[str, float]) -> dict:
    """What a whole schedule can give: the SNR that a meaningful ε needs, and that of the last level that has a signal."""
    known = [t for t in range(schedule.num_timesteps) if accounting.snr(schedule, t) > 0]
    last = accounting.snr(schedule, known[-1])
    return {
        "delta": options.delta,
        "target_epsilon": TARGET_EPSILON,
        "last_level": known[-1],
        "last_snr": last,
        "clip_norms": {
            name: {
                "clip_norm": norm,
                "snr_needed": accounting.snr_for_epsilon(TARGET_EPSILON, options.delta, norm),
                "last_epsilon": accounting.epsilon(accounting.rho(norm, last), options.delta),
            }
            for name, norm in norms.items()
        },
    }


def norm_quantiles(x_0: torch.Tensor) -> dict[str, float]:
    """Largest norm and quantiles of latents (n, 4, h, w)."""
    norms = x_0.double().flatten(1).norm(dim=1).numpy()
    return {"data_max": float(norms.max()), **{f"data_q{q:02d}": float(np.quantile(norms, q / 100)) for q in (50, 5)}}


# -- the best linear reconstruction ----------------------------------------------------------------------


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

        found = solve_b(rest)
        if self.weight < 1:
            rows, solved = self.rows.flatten(1), solve_b(self.rows).flatten(1)
            scale = len(rows) / (alpha**2 * (1 - self.weight))
            inner = scale * torch.eye(len(rows), dtype=torch.float64) + solved @ rows.T
            found = found - (torch.linalg.solve(inner, rows @ found.flatten(1).T).T @ solved).view_as(rest)
        return found


def choose_weight(references: torch.Tensor, alpha: float, sigma: float, seed: int) -> float:
    """The λ whose filter, made of every other reference, errs least on the rest."""
    known, unknown = references[::2], references[1::2].double()
    z = torch.randn(unknown.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x_n = alpha * unknown + sigma * z
    errors = [float((LinearFilter(known, w)(x_n, alpha, sigma) - unknown).square().mean()) for w in WEIGHTS]
    return WEIGHTS[int(np.argmin(errors))]


# -- which picture it was ----------------------------------------------------------------------


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


# -- the run ----------------------------------------------------------------------


@dataclass
class Attacked:
    """The images under attack: those looked for, their latents (n, 4, h, w), those reconstructed, and the references'."""

    pictures: Sequence[Scanned]
    x_0: torch.Tensor
    shown: list[Shown]
    references: torch.Tensor

    def noise(self, seed: int, i: int, t: int, draws: int) -> torch.Tensor:
        """z (draws, 4, h, w) of an image at a level; draw k is the same for any number of them."""
        streams = [preview_generator(seed, self.pictures[i].content, t, f"privacy {k}") for k in range(draws)]
        return torch.stack([torch.randn(self.x_0[i].shape, generator=g) for g in streams])

    def observe(self, schedule: NoiseSchedule, shown: Shown, t: int, seed: int) -> torch.Tensor:
        """x_n (4, h, w), float32: the first draw of an image that is reconstructed."""
        return schedule.observe(shown.x_0[None], levels(t, 1), self.noise(seed, shown.index, t, 1))[0]


def collect(options: PrivacyOptions, vae, say) -> Attacked:
    """Read and encode the images, and the references that are not among them.

    Raises:
        ImagesMissing, ImageError: no usable image.
        PrivacyError: fewer than four references.
    """
    state = one_process(resolve_device(options.device))
    pictures, indices = choose(options, state, say)
    other = replace(
        options,
        train_data_dir=options.reference_data_dir,
        caption=False,
        num_candidates=options.num_references,
        num_images=1,
    )
    known = {p.content for p in pictures}
    references = [p for p in choose(other, state, say)[0] if p.content not in known]
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
    options: PrivacyOptions, schedule: NoiseSchedule, unet, image: Shown, x_n: torch.Tensor, t: int
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


def measure(options: PrivacyOptions, schedule: NoiseSchedule, say) -> tuple[dict, dict[int, dict], dict[str, float]]:
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
    found, unet = collect(options, place.use(vae), say), None
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


def assess(options: PrivacyOptions, say=print) -> dict:
    """All figures, as ``--output_file`` holds them.

    Raises:
        ImagesMissing, ImageError, ModelError, PreviewError, PrivacyError: with one line that says what is wrong.
    """
    schedule = load_schedule(options.pretrained_model_name_or_path, options.revision)
    if max(options.t_n) >= schedule.num_timesteps:
        raise ModelError(f"--t_n: {max(options.t_n)} is beyond this model's last level, {schedule.num_timesteps - 1}")
    if coefficients(schedule, min(options.t_n))[1] == 0:
        raise ModelError(f"--t_n: {min(options.t_n)} has no noise in this model's schedule; allowed is a level that has")
    norms = {"unit_variance": math.sqrt(options.dimension)}
    if options.clip_norm is not None:
        norms["clip_norm"] = options.clip_norm
    data, by_level = None, {}
    if options.train_data_dir is not None:
        data, by_level, found = measure(options, schedule, say)
        norms.update(found)
    return {
        "note": NOTE,
        "settings": settings(options),
        "data": data,
        "levels": {str(t): {**closed_forms(options, schedule, t, norms), **by_level.get(t, {})} for t in options.t_n},
        "zcdp": accounted(options, schedule, norms),
        "versions": versions(),
    }


def settings(options: PrivacyOptions) -> dict:
    """The options that shape the figures. No folder: their names may say what is in them."""
    names = ("resolution", "center_crop", "caption", "num_images", "num_candidates", "num_references", "draws", "use_unet")
    more = ("posterior_samples", "steps", "dimension", "clip_norm", "delta", "seed", "dtype")
    return {name: getattr(options, name) for name in (*names, *more)}


# -- command line ----------------------------------------------------------------------


def in_words(found: dict) -> list[str]:
    """A short table, a line each."""
    lines = [] if found["data"] is None else [*_attacks(found), ""]
    lines.append("k independent draws of one picture at t_n tell as much as one draw at level")
    lines.append("  t_n" + "".join(f"{'k = ' + str(k):>9}" for k in OBSERVATIONS))
    for t, level in found["levels"].items():
        shown = (level["observations"][str(k)] for k in OBSERVATIONS)
        lines.append(f"{t:>5}" + "".join(f"{'below 0' if s is None else format(s, '.0f'):>9}" for s in shown))
    return [*lines, "", *_accounting(found)]


def _attacks(found: dict) -> list[str]:
    data = found["data"]
    ways = list(next(iter(found["levels"].values()))["reconstruction"])
    fixed = {name: means["psnr_db"] for name, means in data["reconstruction"].items()}
    lines = [
        f"PSNR to the clean picture in dB, mean of {data['reconstructed']}; through the VAE {fixed['vae_round_trip']:.1f}, "
        f"mean of the references {fixed['reference_mean']:.1f}; and found among {data['candidates']} candidates",
        "  t_n" + "".join(f"{way:>10}" for way in ways) + "     found  (by chance)  error of two, expected",
    ]
    for t, level in found["levels"].items():
        told = level["identification"]
        lines.append(
            f"{t:>5}"
            + "".join(f"{level['reconstruction'][way]['psnr_db']:>10.1f}" for way in ways)
            + f"{told['rate']:>10.1%}  {'(' + format(told['chance'], '.1%') + ')':>11}"
            + f"  {told['pair_error']:>12.2e}, {told['pair_error_expected']:.2e}"
        )
    return lines


def _accounting(found: dict) -> list[str]:
    whole, levels_of = found["zcdp"], found["levels"]
    lines = [
        f"epsilon of one draw at delta = {whole['delta']:g}, if latents were clipped to norm C (training doesn't)",
        "".join(["C".rjust(24), *(f"t_n = {t}".rjust(12) for t in levels_of), f"last = {whole['last_level']}".rjust(14)]),
    ]
    for name, at in whole["clip_norms"].items():
        each = "".join(f"{level['zcdp'][name]['epsilon']['1']:>12.3g}" for level in levels_of.values())
        lines.append(f"{name:>14} {at['clip_norm']:>9.1f}{each}{at['last_epsilon']:>14.3g}")
    unit = whole["clip_norms"]["unit_variance"]
    lines.append(
        f"unit_variance: a latent of {found['settings']['dimension']} numbers of variance 1. There epsilon = "
        f"{whole['target_epsilon']:g} needs SNR {unit['snr_needed']:.1e}; the last level has {whole['last_snr']:.1e}"
    )
    return [*lines, found["note"]]


def main(argv: list[str] | None = None) -> int:
    options = parse_options(PrivacyOptions, argv, prog="sdxl_ambient.privacy", description=__doc__)
    words = sys.stdout if options.output_file else sys.stderr  # what is printed stays JSON
    try:
        found = assess(options, say=lambda message: print(message, file=sys.stderr))
        if options.output_file:
            write_json(options.output_file, found)
        else:
            print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    except (ImagesMissing, ImageError, ModelError, PreviewError, PrivacyError, OSError) as error:
        print(f"sdxl_ambient.privacy: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(in_words(found)), file=words)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
