"""Makes a preview, level by level, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from sdxl_ambient.devices import DTYPES, Placement, one_process, resolve_device
from sdxl_ambient.errors import ModelError, PreviewError
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.images.sources import Log
from sdxl_ambient.models.base import check_sdxl, load_schedule
from sdxl_ambient.models.denoiser import Denoiser
from sdxl_ambient.models.load import Encoders, load_encoders, load_unet
from sdxl_ambient.models.prediction import check_prediction
from sdxl_ambient.models.vae import check_resolution
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.preview.figures import decibel, latent_moments, linear_error, linear_reconstruction, nearest
from sdxl_ambient.preview.files import TileWriter, read_preview, refuse_other, write_tile
from sdxl_ambient.preview.picture import WARNING
from sdxl_ambient.preview.settings import PreviewSettings
from sdxl_ambient.probe import (
    ProbedImage,
    add_conditioning,
    choose,
    compare,
    decode_latent,
    denoise,
    encode_candidates,
    observe,
    preview_generator,
)
from sdxl_ambient.provenance import hash_json, hash_tensors, versions, write_json
from sdxl_ambient.store.plan import hash_tokenizer
from sdxl_ambient.store.scan import Scanned


def recorded(settings: PreviewSettings) -> dict[str, Any]:
    """The settings that shape a preview, as preview.json keeps them."""
    names = ("num_images", "num_candidates", "posterior_samples", "steps", "seed", "resolution", "center_crop", "caption")
    kept = {name: getattr(settings, name) for name in names}
    device = resolve_device(settings.device).type
    return {"t_n": sorted(settings.t_n), **kept, "dtype": settings.dtype, "device": device}


class Preview:
    """A preview under way: what doesn't change over it, and the entries that are there, by content and level."""

    def __init__(
        self,
        settings: PreviewSettings,
        record: dict[str, Any],
        schedule: NoiseSchedule,
        x_0: torch.Tensor,
        shown: list[ProbedImage],
    ):
        self.settings, self.record, self.schedule, self.x_0, self.shown = settings, record, schedule, x_0, shown
        self.output = Path(settings.output_dir)
        self.mean, self.variance = latent_moments(x_0)
        self.t_n = sorted(settings.t_n)
        self.round_trips: dict[str, dict[str, Any]] = {}
        self.entries: dict[tuple[str, int], dict[str, Any]] = {}

    def take(self, stored: dict | None) -> None:
        """Go on with the entries of an earlier run whose tiles are there. Raises PreviewError for damaged ones."""
        try:
            for image in (stored or {"images": []})["images"]:
                if self._there([{"tile": image["original"]}, image["round_trip"]]):
                    self.round_trips[image["content"]] = image["round_trip"]
                for t, entry in image["levels"].items():
                    if self._there([entry["noisy"], entry["denoised"], *entry["samples"]]):
                        self.entries[image["content"], int(t)] = entry
        except (KeyError, TypeError, ValueError, AttributeError):
            raise PreviewError(f"{self.output / 'preview.json'} is damaged; use another --output_dir") from None

    def _there(self, tiles: list[dict]) -> bool:
        return all((self.output / t["tile"]).is_file() for t in tiles)

    # -- originals ------------------------------------------------------------------

    def add_originals(self, vae) -> None:
        """The original and its way through the VAE, which is what similarities are measured against."""
        self.write()  # the settings first, so that no tile is without them
        for image in self.shown:
            if image.picture.content in self.round_trips:
                continue
            back, name = decode_latent(vae, image.x_0), image.tile("round_trip")
            write_tile(self.output, image.tile("original"), image.square)
            write_tile(self.output, name, back)
            self.round_trips[image.picture.content] = {"tile": name, **compare(back, image.square)}
        self.write()

    # -- levels ------------------------------------------------------------------

    def todo(self, t: int) -> list[ProbedImage]:
        """The images that have no entry at a level."""
        return [image for image in self.shown if (image.picture.content, t) not in self.entries]

    def reconstruct(self, image: ProbedImage, t: int, unet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x_n, x̂_0 and the samples of an image at a level."""
        settings, device, dtype = self.settings, unet.device, DTYPES[self.settings.dtype]
        x_n = observe(self.schedule, image, t, settings.seed)
        names = [f"sample {k}" for k in range(settings.posterior_samples)]
        generators = [preview_generator(settings.seed, image.picture.content, t, name) for name in names]
        network = Denoiser(unet, image.repeated(len(names), device, dtype), dtype)
        return x_n, *denoise(network, self.schedule, x_n.to(device), t, settings.steps, generators)

    def add_entry(self, image: ProbedImage, t: int, latents: tuple[torch.Tensor, torch.Tensor, torch.Tensor], vae) -> None:
        """Decode, compare and write what :meth:`reconstruct` gave. The entry is there once its tiles are."""
        x_n, mean, samples = latents
        alpha, sigma = self.coefficients(t)
        linear = linear_reconstruction(x_n.double(), alpha, sigma, self.variance, self.mean)
        reference = Image.open(self.output / image.tile("round_trip")).convert("RGB")
        add = TileWriter(self.output, image, t, vae, reference)
        self.entries[image.picture.content, t] = {
            "noisy": add("noisy", x_n),
            "linear": self.latent_error(linear, image.x_0),
            "denoised": {**add("denoised", mean), **self.latent_error(mean, image.x_0)},
            "samples": [{**add(f"sample{k}", x), **self.latent_error(x, image.x_0)} for k, x in enumerate(samples)],
            "identified": {"noisy": self.identified(image, x_n, alpha), "denoised": self.identified(image, mean, 1.0)},
        }
        self.write()

    def coefficients(self, t: int) -> tuple[float, float]:
        """α_n and σ_n."""
        level = torch.tensor([t])
        return float(self.schedule.alpha(level)), float(self.schedule.sigma(level))

    def latent_error(self, x: torch.Tensor, x_0: torch.Tensor) -> dict:
        """Squared error per dimension in units of the set's latent variance s², and the same in dB below it."""
        mse = float((x.double() - x_0.double()).square().mean()) / max(self.variance, 1e-12)
        return {"latent_mse": mse, "latent_psnr_db": decibel(mse)}

    def identified(self, image: ProbedImage, x: torch.Tensor, scale: float) -> dict:
        """Whether ``x`` is nearest to ``scale`` times its own latent, among those that are shown and among all candidates.

        For x_n and α_n the nearest is the likeliest: no test of "which of these is it?" is better.
        """
        shown = [s.index for s in self.shown]
        return {
            "shown": shown[nearest(x, scale * self.x_0[shown])] == image.index,
            "candidates": nearest(x, scale * self.x_0) == image.index,
        }

    # -- preview.json ------------------------------------------------------------------

    def level(self, t: int) -> dict:
        """What holds for a level: closed forms, and means over the images that have an entry."""
        alpha, sigma = self.coefficients(t)
        expected = linear_error(alpha, sigma, self.variance)
        entries = [e for e in (self.entries.get((s.picture.content, t)) for s in self.shown) if e is not None]
        means = {name: _means([e[name] for e in entries]) for name in ("noisy", "linear", "denoised")}
        rates = {
            what: {among: _mean([e["identified"][what][among] for e in entries]) for among in ("shown", "candidates")}
            for what in ("noisy", "denoised")
        }
        return {
            "alpha": alpha,
            "sigma": sigma,
            "latent_snr_db": decibel(sigma**2 / max(alpha**2 * self.variance, 1e-12)),
            "linear_expected": {"latent_mse": expected, "latent_psnr_db": decibel(expected)},
            **means,
            "samples": _means([s for e in entries for s in e["samples"]]),
            "identification_rate": rates,
        }

    def describe(self) -> dict:
        """preview.json, as far as it has got: a function of settings and entries alone."""
        images = []
        for image in self.shown:
            content = image.picture.content
            if content not in self.round_trips:
                continue
            there = {str(t): self.entries[content, t] for t in self.t_n if (content, t) in self.entries}
            images.append(
                {
                    "content": content,
                    "file": image.picture.record.name,
                    "caption": image.picture.caption if self.settings.caption else None,
                    "original": image.tile("original"),
                    "round_trip": self.round_trips[content],
                    "levels": there,
                }
            )
        return {
            "holds_clean_images": True,
            "note": f"{WARNING} Its noise is its own, not that of any store.",
            "complete": len(self.entries) == len(self.shown) * len(self.t_n),
            "pretrained_model_name_or_path": str(self.settings.pretrained_model_name_or_path),
            "settings": self.record,
            "candidates": len(self.x_0),
            "latent_mean": self.mean.flatten().tolist(),
            "latent_variance": self.variance,
            "levels": {str(t): self.level(t) for t in self.t_n},
            "images": images,
            "versions": versions(),
        }

    def write(self) -> None:
        write_json(self.output / "preview.json", self.describe())


def _mean(values: Sequence) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _means(rows: Sequence[dict]) -> dict:
    """Mean of every number of equal rows."""
    return {name: _mean([r[name] for r in rows]) for name in rows[0] if name != "tile"} if rows else {}


def make_preview(settings: PreviewSettings, log: Log = print) -> dict[str, Any]:
    """Make a preview, finish an interrupted one, or confirm that the one there is what is wanted. Returns preview.json.

    Raises:
        ImagesMissing, ImageError, ModelError, ProbeError, PreviewError: with one line that says what is wrong.
    """
    output, device = Path(settings.output_dir), resolve_device(settings.device)
    stored, record = read_preview(output), recorded(settings)
    refuse_other(stored, record)
    base, place, dtype = settings.pretrained_model_name_or_path, Placement(device), DTYPES[settings.dtype]
    revision, variant = settings.revision, settings.variant
    zeros = check_sdxl(base, revision, log, settings.prediction_type).get("force_zeros_for_empty_prompt", True)
    schedule = load_schedule(base, revision, settings.prediction_type)
    if max(settings.t_n) >= schedule.num_timesteps:
        raise ModelError(f"--t_n: {max(settings.t_n)} is beyond this model's last level, {schedule.num_timesteps - 1}")
    vae_path = settings.pretrained_vae_model_name_or_path
    encoders = load_encoders(base, vae=vae_path, text_dtype=dtype, revision=revision, variant=variant)
    check_resolution(settings.resolution, encoders.vae)
    candidates, indices = choose(settings.choice, one_process(device), log)
    record.update(_inputs(candidates, encoders, schedule))
    refuse_other(stored, record)
    geometry = Geometry(settings.resolution, settings.center_crop)
    x_0, shown = encode_candidates(candidates, indices, place.use(encoders.vae), geometry)
    add_conditioning(shown, encoders, settings.caption, zeros, place)
    vae = encoders.vae
    del encoders  # the text encoders are out of memory from here on
    unet = load_unet(base, dtype=dtype, revision=revision, variant=variant).eval().requires_grad_(False)
    check_prediction(place.use(unet), schedule, repr(base), settings.prediction_type)
    record["unet"] = hash_tensors(unet.state_dict())[:16]
    refuse_other(stored, record)
    preview = Preview(settings, record, schedule, x_0, shown)
    preview.take(stored)
    preview.add_originals(place.use(vae))
    run_levels(preview, unet, vae, place)
    preview.write()
    return preview.describe()


def _inputs(candidates: Sequence[Scanned], encoders: Encoders, schedule: NoiseSchedule) -> dict[str, str]:
    """What images and networks a preview is of, in hashes that are short enough to be read."""
    text = [*map(hash_tokenizer, encoders.tokenizers), *(hash_tensors(e.state_dict()) for e in encoders.text_encoders)]
    hashes = {
        "images": hash_json([p.content for p in candidates]),
        "captions": hash_json([p.caption for p in candidates]),
        "vae": hash_tensors(encoders.vae.state_dict()),
        "text_encoders": hash_json(text),
        "schedule": schedule.hash,
    }
    return {name: value[:16] for name, value in hashes.items()}


def run_levels(preview: Preview, unet, vae, place: Placement) -> None:
    """Every entry that is missing, one level after the other.

    On a GPU, UNet and VAE take turns once per level; on a CPU, where turns are free, once per image, so that less is lost
    when a run is interrupted.
    """
    left = {t: preview.todo(t) for t in preview.t_n}
    with tqdm(total=sum(map(len, left.values())), desc="denoising", unit="image", mininterval=1) as bar:
        for t, images in left.items():
            bar.set_postfix(t_n=t)
            size = 1 if place.device.type == "cpu" else max(1, len(images))
            for group in (images[i : i + size] for i in range(0, len(images), size)):
                latents = [preview.reconstruct(image, t, place.use(unet)) for image in group]
                for image, made in zip(group, latents, strict=True):
                    preview.add_entry(image, t, made, place.use(vae))
                    bar.update()
