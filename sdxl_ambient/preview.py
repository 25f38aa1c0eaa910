r"""What noisy latents show, level by level: an aid to choosing t_n before a store is drawn.

    python -m sdxl_ambient.preview --pretrained_model_name_or_path BASE --train_data_dir DIR --t_n 100 300 500 800 \
        --output_dir OUT

For a few images of a set and every level: the noisy latent as the VAE decodes it, the base model's x̂_0 = E[x_0|x_n] in one
step, and samples of p(x_0|x_n) by its reverse chain, each with its similarity to the original; and whether the latent can
still be told from the others of the set.

    preview.json     every number; written anew after each step, so that an interrupted run goes on where it stopped
    tiles/           the pictures, 8-bit PNG, in a folder per image
    preview.png      made from those two alone (``--redraw`` makes it again)

**It holds clean images**: treat OUT like the originals. Its noise is its own, made from ``--seed``; no noise key is read.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from sdxl_ambient.chain import Denoise, posterior_mean, restore
from sdxl_ambient.conditioning import encode_prompts, time_ids
from sdxl_ambient.config import OptionError, option, parse_options
from sdxl_ambient.geometry import Geometry
from sdxl_ambient.images import ImageError, ImagesMissing, list_images, load_rgb
from sdxl_ambient.latents import check_resolution, decode_latents, encode_image
from sdxl_ambient.manifest import atomic, differences, hash_json, hash_tensors, read_json, versions, write_json
from sdxl_ambient.models import (
    Conditioning,
    Denoiser,
    Encoders,
    ModelError,
    check_sdxl,
    load_encoders,
    load_schedule,
    load_unet,
)
from sdxl_ambient.noise import NoiseSchedule, levels
from sdxl_ambient.options import MAXIMUM_T_N, ModelOptions, check_writable
from sdxl_ambient.plan import Scanned, content_hash, hash_tokenizer, scan
from sdxl_ambient.preview_picture import WARNING, draw
from sdxl_ambient.randomness import Randomness

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROUNDING = 1 / 12  # variance of rounding to whole grey levels: no difference of two 8-bit pictures means less


class PreviewError(ValueError):
    """A preview that is damaged, or differs from what is asked for. The message is one line that says in what."""


# -- options ----------------------------------------------------------------------


@dataclass
class PreviewOptions(ModelOptions):
    """``python -m sdxl_ambient.preview``."""

    train_data_dir: str | None = option(None, "folder of images, with captions in metadata.jsonl or .txt files")
    caption_column: str = option("text", "the column of metadata.jsonl that holds the captions")
    instance_prompt: str | None = option(None, "caption for images that have none; without it they are skipped")
    caption: bool = option(True, "tell the model each image's caption, as whoever has them would; false tells it none")
    resolution: int = option(1024, "side of the square that images are resized and cropped to, pixels", minimum=16)
    center_crop: bool = option(True, "crop the middle; if false, the place that a store would take")
    t_n: list[int] = option([100, 300, 500, 800], "noise levels to show, timesteps", minimum=0, maximum=MAXIMUM_T_N)
    num_images: int = option(4, "images shown, evenly from the set", minimum=1)
    num_candidates: int = option(256, "images of the set that one is looked for among, at most", minimum=1)
    posterior_samples: int = option(2, "samples by the reverse chain, per image and level", minimum=0, maximum=16)
    steps: int = option(25, "evaluations of the chain that draws one", minimum=1)
    seed: int = option(0, "the preview's own noise follows from this, the level and the image", minimum=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, …")
    dtype: str = option("float32", "precision of UNet and text encoders", choices=tuple(DTYPES))
    redraw: bool = option(False, "only make preview.png again from the files in --output_dir")
    output_dir: str | None = option(None, "folder for the preview")

    def validate(self) -> None:
        if not self.output_dir:
            raise OptionError("--output_dir: a value is required, a folder for the preview")
        check_writable("output_dir", self.output_dir)
        if self.redraw:
            if not (Path(self.output_dir) / "preview.json").is_file():
                raise OptionError(f"--redraw: true needs a preview, and {self.output_dir!r} holds no preview.json")
            return
        super().validate()
        if not self.train_data_dir:
            raise OptionError("--train_data_dir: a value is required, a folder of images")
        if not Path(self.train_data_dir).is_dir():
            raise OptionError(f"--train_data_dir: {self.train_data_dir!r} is not a folder")
        self._validate_output()
        check_levels(self.t_n)
        check_device(self.device)

    def _validate_output(self) -> None:
        """What is made to be kept apart from clean images must not come to hold them."""
        output = Path(self.output_dir).resolve()
        if output.is_relative_to(Path(self.train_data_dir).resolve()):
            raise OptionError(
                f"--output_dir: {self.output_dir!r} lies inside --train_data_dir, whose images it would be taken for; "
                "allowed is a folder elsewhere"
            )
        for folder in (output, *output.parents):
            if is_store(folder):
                raise OptionError(
                    f"--output_dir: {self.output_dir!r} lies inside the store of noisy latents {str(folder)!r}, and a "
                    "preview holds clean images; allowed is a folder elsewhere"
                )


def is_store(folder: Path) -> bool:
    """Whether a folder is a store of noisy latents, finished or not, damaged or not."""
    if next(folder.glob("latents-*.safetensors"), None) is not None:
        return True
    for name in ("plan.json", "manifest.json"):
        try:
            if "latent" in read_json(folder / name)["fingerprint"]:
                return True
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not there, or not one of ours
    return False


def check_levels(t_n: list[int]) -> None:
    """One level or more, each once; an OptionError else."""
    if not t_n:
        raise OptionError("--t_n: a value is required, one timestep or more")
    twice = [t for t in t_n if t_n.count(t) > 1]
    if twice:
        raise OptionError(f"--t_n: {twice[0]} is given twice; allowed is each level once")


def check_device(device: str) -> None:
    """auto, cpu, or a CUDA GPU that is there; an OptionError else."""
    try:
        asked = torch.device("cpu" if device == "auto" else device)
    except RuntimeError:
        asked = None
    if asked is None or asked.type not in ("cpu", "cuda"):
        raise OptionError(f"--device: {device!r} is not one of auto, cpu, cuda, cuda:N")
    if asked.type == "cuda" and (asked.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"--device: {device!r} is not there; this machine has {torch.cuda.device_count()} CUDA GPUs")


# -- closed forms ----------------------------------------------------------------------


def psnr_db(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio 10 log₁₀(255² / MSE) of 8-bit pictures (h, w, 3), in dB; at most 58.9, for equal ones."""
    mse = np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(mse, ROUNDING)))


def correlation(image: Image.Image, reference: Image.Image) -> float:
    """Correlation of two RGB pictures at 16×16 pixels, each channel's mean taken off; 0 where one of them is uniform.

    What the evaluation's ``pixel`` embedder measures, so that figures can be compared.
    """
    a, b = (_centred_thumbnail(picture) for picture in (image, reference))
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum() / norm) if norm > 1e-9 else 0.0


def _centred_thumbnail(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    return pixels - pixels.mean(axis=(0, 1))


def latent_moments(x_0: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean μ of each channel, (4, 1, 1), and variance s² about it, of latents (n, 4, h, w); both in float64."""
    x_0 = x_0.double()
    mean = x_0.mean((0, 2, 3))[:, None, None]
    return mean, float((x_0 - mean).square().mean())


def linear_reconstruction(x_n: torch.Tensor, alpha: float, sigma: float, variance: float, mean=0.0) -> torch.Tensor:
    """Best linear estimate of x_0 from x_n = α x_0 + σ z: μ + s²α (x_n − αμ)/(α²s² + σ²), for x_0 of mean μ, variance s².

    What anyone can do without a model, number by number. For Gaussian x_0 it is the posterior mean (the Wiener filter).
    """
    return mean + variance * alpha * (x_n - alpha * mean) / (alpha**2 * variance + sigma**2)


def linear_error(alpha: float, sigma: float, variance: float) -> float:
    """Expected squared error of :func:`linear_reconstruction` per dimension, in units of s²: σ²/(α²s² + σ²), in [0, 1]."""
    return sigma**2 / (alpha**2 * variance + sigma**2)


def decibel(error: float) -> float:
    """An error in units of the signal's variance → dB below it; 0 dB is what a constant guess gets."""
    return -10 * math.log10(max(error, 1e-12))


def nearest(query: torch.Tensor, references: torch.Tensor) -> int:
    """Index of the reference (n, …) with the smallest squared distance to ``query`` (…), in float64; the first of equals."""
    return int(torch.stack([(query.double() - r.double()).square().sum() for r in references]).argmin())


# -- which images ----------------------------------------------------------------------


def evenly(total: int, count: int) -> list[int]:
    """``count`` distinct indices below ``total``, in the middle of equal pieces; all of them where there are no more."""
    count = min(total, count)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def choose(options: PreviewOptions, state: PartialState, say) -> tuple[list[Scanned], list[int]]:
    """The candidates, distinct pictures evenly from the set, and the indices of those among them that are shown.

    Raises:
        ImagesMissing: no usable image.
    """
    records = list_images(
        options.train_data_dir,
        options.caption_column,
        captions_needed=options.caption and not options.instance_prompt,
    )
    some = [records[i] for i in evenly(len(records), options.num_candidates)]
    # Where captions aren't told, images need none; the placeholder is never read.
    prompt = options.instance_prompt if options.caption else options.instance_prompt or "-"
    pictures, skipped = scan(some, prompt, state)
    candidates = list({p.content: p for p in reversed(pictures)}.values())[::-1]
    if not candidates:
        raise ImagesMissing(f"none of {len(some)} images in {options.train_data_dir!r} can be used: {skipped[0]['reason']}")
    if skipped:
        first = f"{skipped[0]['file']}: {skipped[0]['reason']}"
        say(f"note: {len(skipped)} of {len(some)} images are skipped, the first is {first}")
    if len(candidates) < options.num_images:
        say(f"note: {len(candidates)} images are shown, since there are no more")
    return candidates, evenly(len(candidates), options.num_images)


@dataclass
class Shown:
    """An image that is shown: where it is among the candidates, its square, its latent (4, h, w), what the model is told."""

    picture: Scanned
    index: int
    square: Image.Image
    x_0: torch.Tensor
    time_ids: list[int]
    conditioning: Conditioning | None = None

    def tile(self, name: str) -> str:
        """Path of one of its tiles, relative to the preview."""
        return f"tiles/{self.picture.content[:16]}/{name}.png"


def encode_candidates(
    candidates: Sequence[Scanned], shown: Sequence[int], vae, geometry: Geometry
) -> tuple[torch.Tensor, list[Shown]]:
    """Clean latents (n, 4, h, w) of all candidates, float32 on the CPU, and what is needed of those that are shown."""
    latents, found = [], []
    for i, picture in enumerate(tqdm(candidates, desc="encoding images", unit="image", mininterval=1)):
        image = load_rgb(picture.record.path)
        if content_hash(image) != picture.content:
            raise PreviewError(f"{picture.record.path} changed while it was being encoded")
        pixels, corner = geometry.apply(image, picture.content)
        latents.append(encode_image(vae, pixels))
        if i in shown:
            ids = time_ids(picture.size, corner, (geometry.resolution,) * 2)
            found.append(Shown(picture, i, _to_image(pixels), latents[-1], ids))
    return torch.stack(latents), found


# -- latents => pixels ----------------------------------------------------------------------


def decode_latent(vae, latent: torch.Tensor) -> Image.Image:
    """Latent (4, h, w) as the UNet sees it → RGB picture."""
    return _to_image(decode_latents(vae, latent[None].to(vae.device, torch.float32))[0])


def _to_image(pixels: torch.Tensor) -> Image.Image:
    """Pixels (3, H, W), [−1, 1] and cut to that → 8 bits."""
    eight = ((pixels.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(eight.permute(1, 2, 0).numpy())


def write_tile(output: Path, name: str, image: Image.Image) -> None:
    """Write a picture whole or not at all."""
    with atomic(output / name) as temporary:
        image.save(temporary)


def compare(image: Image.Image, reference: Image.Image) -> dict:
    """Similarities of two pictures of one size."""
    return {"psnr_db": psnr_db(np.asarray(image), np.asarray(reference)), "correlation": correlation(image, reference)}


# -- what the model makes of a noisy latent ----------------------------------------------------------------------


def preview_generator(seed: int, content: str, t: int, purpose: str) -> torch.Generator:
    """A stream for one image, level and purpose, whatever the batch and order; never that of a store, which has a key."""
    digest = hashlib.sha256(f"sdxl_ambient preview|{seed}|{content}|{t}|{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def observe(schedule: NoiseSchedule, shown: Shown, t: int, seed: int) -> torch.Tensor:
    """x_n (4, h, w) of an image at level ``t``, float32, by the preview's own noise."""
    z = Randomness([preview_generator(seed, shown.picture.content, t, "observation")], 1).normal(shown.x_0[None])
    return schedule.observe(shown.x_0[None], levels(t, 1), z)[0]


@torch.no_grad()
def denoise(
    network: Denoise, schedule: NoiseSchedule, x_n: torch.Tensor, t: int, steps: int, generators: list[torch.Generator]
) -> tuple[torch.Tensor, torch.Tensor]:
    """x̂_0 = E[x_0|x_n], (4, h, w), and one sample of p(x_0|x_n) per generator, (k, 4, h, w); float32 on the CPU.

    The samples of an image are one batch, so that no other image changes the last bits of it.

    Raises:
        ModelError: the network gives NaN or infinity.
    """
    mean = posterior_mean(network, schedule, x_n[None], levels(t, 1, x_n.device))[0].float().cpu()
    count, samples = len(generators), x_n.new_empty((0, *x_n.shape)).cpu()
    if count:
        repeated = x_n[None].repeat(count, 1, 1, 1)
        samples = restore(network, schedule, repeated, levels(t, count), steps, Randomness(generators, count)).float().cpu()
    if not bool(torch.isfinite(mean).all() and torch.isfinite(samples).all()):
        raise ModelError("the UNet gives values that are not finite; use --dtype bfloat16 or float32")
    return mean, samples


# -- the run ----------------------------------------------------------------------


def asked(options: PreviewOptions) -> dict:
    """The options that shape a preview, as preview.json keeps them."""
    names = ("num_images", "num_candidates", "posterior_samples", "steps", "seed", "resolution", "center_crop", "caption")
    kept = {name: getattr(options, name) for name in names}
    return {"t_n": sorted(options.t_n), **kept, "dtype": options.dtype, "device": resolve_device(options.device).type}


def resolve_device(device: str) -> torch.device:
    """ "auto" is a GPU where there is one."""
    return torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def read_preview(output: Path) -> dict | None:
    """The preview.json that is there, or None.

    Raises:
        PreviewError: a damaged one, or another program's.
    """
    path = output / "preview.json"
    if not path.exists():
        return None
    try:
        stored = read_json(path)
        if stored["holds_clean_images"] is True and isinstance(stored["settings"], dict):
            return stored
    except (ValueError, KeyError, TypeError):
        pass
    raise PreviewError(f"{path} is damaged or not a preview's; use another --output_dir")


def refuse_other(stored: dict | None, wanted: dict) -> None:
    """Refuse to go on with a preview that was begun with other settings; ``wanted`` may be a part of them."""
    if stored is None:
        return
    found = differences({name: stored["settings"].get(name) for name in wanted}, wanted)
    if found:
        raise PreviewError(f"the preview in --output_dir has other settings ({'; '.join(found)}); use another folder")


class Placement:
    """Puts one network at a time on the device, so that its memory holds the larger, not the sum. On a CPU does nothing."""

    def __init__(self, device: torch.device):
        self.device, self.there = device, None

    def use(self, module):
        """The module, on the device; the one that was there goes to the CPU's memory."""
        if self.there is not module:
            self.clear()
            self.there = module.to(self.device)
        return module

    def clear(self) -> None:
        """Nothing on the device."""
        if self.there is not None and self.device.type == "cuda":
            self.there.to("cpu")
            torch.cuda.empty_cache()
        self.there = None


def tell(shown: Sequence[Shown], encoders: Encoders, caption: bool, zeros: bool, place: Placement) -> None:
    """Give every shown image its conditioning: its caption, or none, which is zeros where the pipeline has it so."""
    both = place.use(torch.nn.ModuleList(encoders.text_encoders))
    for image in shown:
        # A text alone in its batch has the same last bits in every set.
        text = image.picture.caption if caption else ""
        embeds, pooled = (e.cpu() for e in encode_prompts([text], encoders.tokenizers, list(both)))
        if not caption and zeros:
            embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        image.conditioning = Conditioning(embeds, pooled, torch.tensor([image.time_ids], dtype=torch.float32))
    place.clear()


class Preview:
    """A preview under way: what doesn't change over it, and the entries that are there, by content and level."""

    def __init__(
        self, options: PreviewOptions, schedule: NoiseSchedule, x_0: torch.Tensor, shown: list[Shown], settings: dict
    ):
        self.options, self.schedule, self.x_0, self.shown, self.settings = options, schedule, x_0, shown, settings
        self.output = Path(options.output_dir)
        self.mean, self.variance = latent_moments(x_0)
        self.t_n = sorted(options.t_n)
        self.round_trips: dict[str, dict] = {}
        self.entries: dict[tuple[str, int], dict] = {}

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

    def todo(self, t: int) -> list[Shown]:
        """The images that have no entry at a level."""
        return [image for image in self.shown if (image.picture.content, t) not in self.entries]

    def reconstruct(self, image: Shown, t: int, unet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x_n, x̂_0 and the samples of an image at a level."""
        options, device, dtype = self.options, unet.device, DTYPES[self.options.dtype]
        x_n = observe(self.schedule, image, t, options.seed)
        names = [f"sample {k}" for k in range(options.posterior_samples)]
        generators = [preview_generator(options.seed, image.picture.content, t, name) for name in names]
        conditioning = image.conditioning.rows([0] * max(1, len(names))).to(device, dtype)
        network = Denoiser(unet, conditioning, dtype)
        return x_n, *denoise(network, self.schedule, x_n.to(device), t, options.steps, generators)

    def add_entry(self, image: Shown, t: int, latents: tuple[torch.Tensor, torch.Tensor, torch.Tensor], vae) -> None:
        """Decode, compare and write what :meth:`reconstruct` gave. The entry is there once its tiles are."""
        x_n, mean, samples = latents
        alpha, sigma = self.coefficients(t)
        linear = linear_reconstruction(x_n.double(), alpha, sigma, self.variance, self.mean)
        reference = Image.open(self.output / image.tile("round_trip")).convert("RGB")
        add = _Tiles(self.output, image, t, vae, reference)
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

    def identified(self, image: Shown, x: torch.Tensor, scale: float) -> dict:
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
                    "caption": image.picture.caption if self.options.caption else None,
                    "original": image.tile("original"),
                    "round_trip": self.round_trips[content],
                    "levels": there,
                }
            )
        return {
            "holds_clean_images": True,
            "note": f"{WARNING} Its noise is its own, not that of any store.",
            "complete": len(self.entries) == len(self.shown) * len(self.t_n),
            "pretrained_model_name_or_path": str(self.options.pretrained_model_name_or_path),
            "settings": self.settings,
            "candidates": len(self.x_0),
            "latent_mean": self.mean.flatten().tolist(),
            "latent_variance": self.variance,
            "levels": {str(t): self.level(t) for t in self.t_n},
            "images": images,
            "versions": versions(),
        }

    def write(self) -> None:
        write_json(self.output / "preview.json", self.describe())


class _Tiles:
    """Decodes latents of one image and level into tiles, and compares them to the round trip."""

    def __init__(self, output: Path, image: Shown, t: int, vae, reference: Image.Image):
        self.output, self.image, self.t, self.vae, self.reference = output, image, t, vae, reference

    def __call__(self, name: str, latent: torch.Tensor) -> dict:
        picture, path = decode_latent(self.vae, latent), self.image.tile(f"t{self.t:03d}-{name}")
        write_tile(self.output, path, picture)
        return {"tile": path, **compare(picture, self.reference)}


def _mean(values: Sequence) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _means(rows: Sequence[dict]) -> dict:
    """Mean of every number of equal rows."""
    return {name: _mean([r[name] for r in rows]) for name in rows[0] if name != "tile"} if rows else {}


def make_preview(options: PreviewOptions, say=print) -> dict:
    """Make a preview, finish an interrupted one, or confirm that the one there is what is asked for. Returns preview.json.

    Raises:
        ImagesMissing, ImageError, ModelError, PreviewError: with one line that says what is wrong.
    """
    output, device = Path(options.output_dir), resolve_device(options.device)
    stored, settings = read_preview(output), asked(options)
    refuse_other(stored, settings)
    base, place, dtype = options.pretrained_model_name_or_path, Placement(device), DTYPES[options.dtype]
    weights = dict(revision=options.revision, variant=options.variant)
    zeros = check_sdxl(base, options.revision).get("force_zeros_for_empty_prompt", True)
    schedule = load_schedule(base, options.revision)
    if max(options.t_n) >= schedule.num_timesteps:
        raise ModelError(f"--t_n: {max(options.t_n)} is beyond this model's last level, {schedule.num_timesteps - 1}")
    encoders = load_encoders(base, vae=options.pretrained_vae_model_name_or_path, text_dtype=dtype, **weights)
    check_resolution(options.resolution, encoders.vae)
    candidates, indices = choose(options, one_process(device), say)
    settings.update(_inputs(candidates, encoders, schedule))
    refuse_other(stored, settings)
    geometry = Geometry(options.resolution, options.center_crop)
    x_0, shown = encode_candidates(candidates, indices, place.use(encoders.vae), geometry)
    tell(shown, encoders, options.caption, zeros, place)
    vae = encoders.vae
    del encoders  # the text encoders are out of memory from here on
    unet = load_unet(base, dtype=dtype, **weights).eval().requires_grad_(False)
    settings["unet"] = hash_tensors(unet.state_dict())[:16]
    refuse_other(stored, settings)
    preview = Preview(options, schedule, x_0, shown, settings)
    preview.take(stored)
    preview.add_originals(place.use(vae))
    run_levels(preview, unet, vae, place)
    preview.write()
    return preview.describe()


def one_process(device: torch.device) -> PartialState:
    """The state of a lone process; several would write the same files."""
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes > 1:
        raise PreviewError("this is made by one process; start it with python -m")
    return state


def _inputs(candidates: Sequence[Scanned], encoders: Encoders, schedule: NoiseSchedule) -> dict:
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


def draw_picture(output: Path) -> tuple[int, int]:
    """preview.json and tiles → preview.png: a row per image, columns by level, the original first. Returns its size, pixels.

    Raises:
        PreviewError: no preview there, or one whose tiles are not.
    """
    found = read_preview(output)
    if found is None:
        raise PreviewError(f"{output} holds no preview.json")
    try:
        image = draw(output, found)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise PreviewError(f"{output} can't be drawn, a file is missing or damaged: {error}") from None
    with atomic(output / "preview.png") as temporary:
        image.save(temporary)
    return image.size


# -- command line ----------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    options = parse_options(PreviewOptions, argv, prog="sdxl_ambient.preview", description=__doc__)
    output = Path(options.output_dir)
    print(f"{output}: {WARNING[0].lower()}{WARNING[1:]}", flush=True)
    try:
        if not options.redraw:
            found = make_preview(options)
            print_levels(found)
        draw_picture(output)
    except (ImagesMissing, ImageError, ModelError, PreviewError, OSError) as error:
        print(f"sdxl_ambient.preview: error: {error}", file=sys.stderr)
        return 2
    print(f"{output / 'preview.png'}, figures in {output / 'preview.json'}")
    return 0


def print_levels(found: dict) -> None:
    """A line per level."""
    print("  t_n  best linear   denoised  r noisy  r denoised  r samples  found by denoised, noisy")
    for t, level in found["levels"].items():
        rates, samples = level["identification_rate"], level["samples"].get("correlation")
        print(
            f"{t:>5} {level['linear_expected']['latent_psnr_db']:>9.1f} dB {level['denoised']['latent_psnr_db']:>7.1f} dB "
            f"{level['noisy']['correlation']:>8.2f} {level['denoised']['correlation']:>11.2f} "
            f"{'-' if samples is None else format(samples, '.2f'):>10}  "
            f"{rates['denoised']['candidates']:.0%}, {rates['noisy']['candidates']:.0%} of {len(found['images'])} "
            f"among {found['candidates']}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
