"""A few pictures of a set in memory: chosen, encoded, observed by noise of their own, and what a model makes of them.

Nothing here is written. The noise follows from a seed that is known, and is never that of a store."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from sdxl_ambient.devices import Placement
from sdxl_ambient.errors import ImagesMissing, ModelError, ProbeError
from sdxl_ambient.images.captions import Columns
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.images.load import list_images, load_rgb
from sdxl_ambient.images.sources import Log
from sdxl_ambient.models.conditioning import encode_prompts, time_ids
from sdxl_ambient.models.denoiser import Conditioning
from sdxl_ambient.models.load import Encoders
from sdxl_ambient.models.vae import decode_latents, encode_image
from sdxl_ambient.noise import NoiseSchedule, levels
from sdxl_ambient.posterior import Denoise, posterior_mean, rows_of, sample_posterior
from sdxl_ambient.randomness import Randomness
from sdxl_ambient.spread import spread
from sdxl_ambient.store.scan import Scanned, content_hash, scan

ROUNDING = 1 / 12  # variance of rounding to whole grey levels: no difference of two 8-bit pictures means less


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


@dataclass(frozen=True)
class ImageChoice:
    """Which images of a folder are probed."""

    folder: str
    columns: Columns = Columns()
    instance_prompt: str | None = None  # caption for images that have none
    caption: bool = True  # the model gets the captions; without, images need none
    num_candidates: int = 256  # images that are encoded, at most
    num_images: int = 1  # those of them that are shown, at most


def choose(choice: ImageChoice, state: PartialState, log: Log) -> tuple[list[Scanned], list[int]]:
    """The candidates, distinct pictures evenly from the set, and the indices of those among them that are shown.

    Raises:
        ImagesMissing: no usable image.
    """
    needed = choice.caption and not choice.instance_prompt
    listing = list_images(choice.folder, replace(choice.columns, captions_needed=needed))
    for line in listing.ledger.lines(choice.folder):
        log(line)
    some = spread(listing, choice.num_candidates)
    # The placeholder is never read.
    prompt = choice.instance_prompt if choice.caption else choice.instance_prompt or "-"
    pictures, skipped = scan(some, prompt, state)
    candidates = list({p.content: p for p in reversed(pictures)}.values())[::-1]
    if not candidates:
        raise ImagesMissing(f"none of {len(some)} images in {choice.folder!r} can be used: {skipped[0]['reason']}")
    if skipped:
        first = f"{skipped[0]['file']}: {skipped[0]['reason']}"
        log(f"note: {len(skipped)} of {len(some)} images are skipped, the first is {first}")
    if len(candidates) < choice.num_images:
        log(f"note: {len(candidates)} images are shown, since there are no more")
    return candidates, spread(range(len(candidates)), choice.num_images)


@dataclass
class ProbedImage:
    """An image that is shown."""

    picture: Scanned
    index: int  # among the candidates
    square: Image.Image
    x_0: torch.Tensor  # its clean latent (4, h, w)
    time_ids: list[int]
    conditioning: Conditioning | None = None  # once :func:`add_conditioning` has made it

    def repeated(self, count: int, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """Its conditioning for ``count`` samples, at least for one."""
        assert self.conditioning is not None, "add_conditioning comes first"
        return self.conditioning.rows([0] * max(1, count)).to(device, dtype)

    def tile(self, name: str) -> str:
        """Path of one of its tiles, relative to the preview."""
        return f"tiles/{self.picture.content[:16]}/{name}.png"


def encode_candidates(
    candidates: Sequence[Scanned], shown: Sequence[int], vae, geometry: Geometry
) -> tuple[torch.Tensor, list[ProbedImage]]:
    """Clean latents (n, 4, h, w) of all candidates, float32 on the CPU, and what is needed of those that are shown."""
    latents, images = [], []
    for i, picture in enumerate(tqdm(candidates, desc="encoding images", unit="image", mininterval=1)):
        image = load_rgb(picture.record.path)
        if content_hash(image) != picture.content:
            raise ProbeError(f"{picture.record.path} changed while it was being encoded")
        pixels, corner = geometry.apply(image, picture.content)
        latents.append(encode_image(vae, pixels))
        if i in shown:
            ids = time_ids(picture.size, corner, (geometry.resolution, geometry.resolution))
            images.append(ProbedImage(picture, i, _to_image(pixels), latents[-1], ids))
    return torch.stack(latents), images


def decode_latent(vae, latent: torch.Tensor) -> Image.Image:
    """Latent (4, h, w) as the UNet sees it → RGB picture."""
    return _to_image(decode_latents(vae, latent[None].to(vae.device, torch.float32))[0])


def _to_image(pixels: torch.Tensor) -> Image.Image:
    """Pixels (3, H, W), [−1, 1] and cut to that → 8 bits."""
    eight = ((pixels.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(eight.permute(1, 2, 0).numpy())


def compare(image: Image.Image, reference: Image.Image) -> dict[str, float]:
    """Similarities of two pictures of one size."""
    return {"psnr_db": psnr_db(np.asarray(image), np.asarray(reference)), "correlation": correlation(image, reference)}


def preview_generator(seed: int, content: str, t: int, purpose: str) -> torch.Generator:
    """A stream for one image, level and purpose, whatever the batch and order; never that of a store, which has a key."""
    digest = hashlib.sha256(f"sdxl_ambient preview|{seed}|{content}|{t}|{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def observe(schedule: NoiseSchedule, shown: ProbedImage, t: int, seed: int) -> torch.Tensor:
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
    mean = posterior_mean(rows_of(network, slice(1)), schedule, x_n[None], levels(t, 1, x_n.device))[0].float().cpu()
    count, samples = len(generators), x_n.new_empty((0, *x_n.shape)).cpu()
    if count:
        repeated = x_n[None].repeat(count, 1, 1, 1)
        samples = (
            sample_posterior(network, schedule, repeated, levels(t, count), steps, Randomness(generators, count))
            .float()
            .cpu()
        )
    if not bool(torch.isfinite(mean).all() and torch.isfinite(samples).all()):
        raise ModelError("the UNet gives values that are not finite; use --dtype bfloat16 or float32")
    return mean, samples


def add_conditioning(shown: Sequence[ProbedImage], encoders: Encoders, caption: bool, zeros: bool, place: Placement) -> None:
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
