"""Pictures → feature vectors. Every embedder says exactly what it does to a picture and with which weights.

``pixel``    no weights: 16×16 RGB, each channel centred. Finds copies at the same place, scale and orientation only.
``dinov2``   DINOv2's class token (Oquab et al. 2023, arXiv 2304.07193).
``dinov2_paper``  the same as arXiv 2404.10177 measured it: ViT-g, 1024 → 224 pixels without antialiasing, not normalised.
``clip``     CLIP's projected image embedding (Radford et al. 2021, arXiv 2103.00020).
``sscd``     the copy-detection descriptor (Pizzi et al. 2022, arXiv 2202.10261), :mod:`eval.embedders.sscd`.
``pooled_pixels``  8×8 RGB means, not normalised: the features of the Fréchet distance ``fd_pixels``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eval.choices import EMBEDDERS
from eval.embedders.sscd import load_sscd
from sdxl_ambient.errors import StageError, one_line
from sdxl_ambient.images.duplicates import fingerprint
from sdxl_ambient.models.finite import check_finite
from sdxl_ambient.models.libraries import LOADING_ERRORS
from sdxl_ambient.provenance import hash_json, hash_tensors

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
DEFAULT_WEIGHTS = {
    "dinov2": "facebook/dinov2-large",
    "dinov2_paper": "facebook/dinov2-giant",
    "clip": "openai/clip-vit-large-patch14",
}


@dataclass
class Embedder:
    """A named map from RGB pictures to vectors.

    Attributes:
        preprocessing: what :meth:`prepare` does, in words and numbers; part of the cache key and of the report.
        weights: where the weights came from, and weights_hash the SHA-256 of their tensors; None where there are none.
        network: (batch, 3, h, w) float32 → (batch, d) float32, without gradients.
        preparing: RGB picture → the network's input, where ``preprocessing`` is only its description.
    """

    name: str
    preprocessing: dict
    network: Callable[[torch.Tensor], torch.Tensor]
    weights: str | None = None
    weights_hash: str | None = None
    device: torch.device | str = "cpu"
    preparing: Callable[[Image.Image], torch.Tensor] | None = None

    @property
    def key(self) -> str:
        """Names the embedder, its preprocessing and its weights; equal keys mean interchangeable features."""
        return f"{self.name}-{hash_json([self.name, self.preprocessing, self.weights_hash])[:16]}"

    def describe(self) -> dict:
        """For the report."""
        return {
            "name": self.name,
            "weights": self.weights,
            "weights_hash": self.weights_hash,
            "preprocessing": self.preprocessing,
        }

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """RGB picture → (3, h, w) float32."""
        return self.preparing(image) if self.preparing else prepare(image, self.preprocessing)

    @torch.no_grad()
    def encode(self, batch: torch.Tensor) -> torch.Tensor:
        """(batch, 3, h, w) → (batch, d) float32 on the CPU, not normalised."""
        return self.network(batch.to(self.device)).float().cpu()


def prepare(image: Image.Image, steps: dict) -> torch.Tensor:
    """Resize (Pillow's filters are antialiased), crop and normalise as ``steps`` says. Returns (3, h, w) float32.

    ``steps`` has ``height`` and ``width``, ``resampling``, ``resize`` ("stretch" to that size, or "short_side" to it
    and then a centre crop), and ``mean`` and ``std`` per channel for values in [0, 1]. With ``antialias`` false, the image
    is stretched to ``first`` pixels with the antialiased filter, and from there to the size by bilinear interpolation.
    """
    height, width = steps["height"], steps["width"]
    resampling = _RESAMPLING[steps["resampling"]]
    if not steps["antialias"]:
        image = image.resize((steps["first"], steps["first"]), resampling)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None] / 255
        pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)[0]
        return _normalise(pixels, steps)
    if steps["resize"] == "stretch":
        image = image.resize((width, height), resampling)
    else:
        image = _without_ends(image)
        short = min(image.size)  # the long side is cut to whole pixels, as the reference processors do; the crop is square
        image = image.resize((image.width * width // short, image.height * height // short), resampling)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return _normalise(torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255, steps)


def _without_ends(image: Image.Image, most: int = 16) -> Image.Image:
    """The middle of a picture whose sides differ more than ``most`` times, of which the crop sees far less.

    A million pixels by eight would otherwise be enlarged whole.
    """
    keep = most * min(image.size)
    if max(image.size) <= keep:
        return image
    width, height = (min(side, keep) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _normalise(pixels: torch.Tensor, steps: dict) -> torch.Tensor:
    mean, std = torch.tensor(steps["mean"])[:, None, None], torch.tensor(steps["std"])[:, None, None]
    return (pixels - mean) / std


def _steps(size: int, resampling: str, normalisation=((0.0,) * 3, (1.0,) * 3), resize: str = "stretch", **more) -> dict:
    mean, std = normalisation
    return {
        "height": size,
        "width": size,
        "resize": resize,
        "resampling": resampling,
        **{"antialias": True, **more},
        "mean": list(mean),
        "std": list(std),
    }


UNIFORM_LENGTH = 2.0**-10  # of a uniform picture's features, so short that no mean or covariance of features feels it


def _centred(batch: torch.Tensor) -> torch.Tensor:
    """Flattened pixels with each channel's mean taken off: normalised, their product is a correlation.

    Nothing would be left of a uniform picture but rounding. It gets features of its own, :func:`_uniform`.
    """
    centred = (batch - batch.mean((2, 3), keepdim=True)).flatten(1)
    is_uniform = centred.norm(dim=1, keepdim=True) <= 1e-3  # pictures of 8 bits are that near to uniform only where they are
    return torch.where(is_uniform, _uniform(batch), centred)


def _uniform(batch: torch.Tensor) -> torch.Tensor:
    """Features by colour alone: two uniform pictures' cosine is the mean over the channels of cos(π (v − v′)).

    Channel c of value v becomes cos(πv) 1 + sin(πv) p_c. 1 is the constant pattern, which is orthogonal to every centred
    picture. p_c is a fixed pattern of as many +1 as −1 at random places, of the same length, which is nearly so. So the
    width stays what it is, and so does every product of other pictures, bit for bit.
    """
    channels, height, width = batch.shape[1:]
    signs = np.repeat([1.0, -1.0], height * width // 2)
    places = np.stack([np.random.RandomState(channel).permutation(signs) for channel in range(channels)])
    patterns = torch.from_numpy(places.astype(np.float32)).view(1, channels, height, width).to(batch)
    angles = torch.pi * batch.mean((2, 3), keepdim=True)
    features = (torch.cos(angles) + torch.sin(angles) * patterns).flatten(1)
    return features * (UNIFORM_LENGTH / (channels * height * width) ** 0.5)


def _pixel(weights: str | None, device: torch.device | str) -> Embedder:
    then = "each channel's mean subtracted; a uniform picture by its colour"
    return Embedder("pixel", _steps(16, "bicubic", then=then), _centred)


def _pooled_pixels(weights: str | None, device: torch.device | str) -> Embedder:
    return Embedder("pooled_pixels", _steps(8, "box", then="flattened"), lambda batch: batch.flatten(1))


def _dinov2(weights: str, device: torch.device | str, name: str = "dinov2", steps: dict | None = None) -> Embedder:
    from transformers import AutoModel

    model = _pretrained(AutoModel, name, weights, device)
    if not model.config.model_type.startswith("dinov2"):
        raise StageError(f"--embedder_weights: {weights!r} holds a {model.config.model_type} model, not DINOv2")
    output = "class token of the last layer, after the final norm"
    return Embedder(
        name,
        {**(steps or _steps(224, "bicubic", _IMAGENET)), "output": output},
        lambda batch: model(pixel_values=batch).last_hidden_state[:, 0],
        weights,
        hash_tensors(model.state_dict()),
        device,
    )


def _dinov2_paper(weights: str, device: torch.device | str) -> Embedder:
    return _dinov2(weights, device, "dinov2_paper", _steps(224, "bilinear", antialias=False, first=1024))


def _clip(weights: str, device: torch.device | str) -> Embedder:
    from transformers import CLIPVisionModelWithProjection

    model = _pretrained(CLIPVisionModelWithProjection, "clip", weights, device)
    steps = _steps(model.config.image_size, "bicubic", _CLIP, "short_side", output="projected image embedding")
    return Embedder(
        "clip",
        steps,
        lambda batch: model(pixel_values=batch).image_embeds,
        weights,
        hash_tensors(model.state_dict()),
        device,
    )


def _sscd(weights: str, device: torch.device | str) -> Embedder:
    try:
        model = load_sscd(weights).to(device)
    except LOADING_ERRORS as error:
        raise _not_loaded("sscd", weights, error) from None
    # The published recommendation for batches: straight to a square, the aspect ratio given up, nothing cropped off.
    return Embedder("sscd", _steps(320, "bilinear", _IMAGENET), model, weights, hash_tensors(model.state_dict()), device)


def _pretrained(kind, name: str, weights: str, device: torch.device | str):
    try:
        # Given explicitly, since a configuration can otherwise ask for either.
        model, report = kind.from_pretrained(
            weights, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except LOADING_ERRORS as error:
        raise _not_loaded(name, weights, error) from None
    if report["missing_keys"]:
        # transformers would draw them at random, and every similarity with them.
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise StageError(f"--embedder_weights: {weights!r} lacks weights of {name}: {missing}, …")
    check_finite(model.state_dict(), f"--embedder_weights: {weights!r}", StageError)
    return model.eval().to(device)


def _not_loaded(name: str, weights: str, error: BaseException) -> StageError:
    reason = one_line(error)
    return StageError(f"--embedder_weights: {name} can't be loaded from {weights!r}: {reason}")


def _fingerprint(weights: str | None, device: torch.device | str) -> Embedder:
    steps = {"hash": "64-bit DCT hash", "thumbnail": "8x8 RGB, box filter", "views": ["as it stands", "mirrored"]}
    return Embedder("fingerprint", steps, lambda batch: batch, preparing=lambda image: torch.from_numpy(fingerprint(image)))


_BUILDERS = {
    "pixel": _pixel,
    "dinov2": _dinov2,
    "dinov2_paper": _dinov2_paper,
    "clip": _clip,
    "sscd": _sscd,
    "pooled_pixels": _pooled_pixels,
    "fingerprint": _fingerprint,
}


def check_embedder(name: str, weights: str | None) -> None:
    """Refuse an impossible choice before anything is loaded. Raises StageError."""
    if name == "pixel" and weights is not None:
        raise StageError(f"--embedder_weights: {weights!r} given, but the embedder 'pixel' has no weights")
    if name == "sscd":
        if weights is None or not Path(weights).is_file() or Path(weights).suffix != ".safetensors":
            raise StageError(
                f"--embedder_weights: {weights!r} is not a .safetensors file, which the embedder 'sscd' needs; "
                "docs/EVALUATION.md shows how to make one from the published weights"
            )
    elif weights is not None and weights.startswith(("/", ".", "~")) and not Path(weights).is_dir():
        raise StageError(f"--embedder_weights: {weights!r} is not a folder; give one, or a model id of the Hub")


def load_embedder(name: str, weights: str | None = None, device: torch.device | str = "cpu") -> Embedder:
    """An embedder by name, with weights from a local folder (sscd: a .safetensors file) or the Hub.

    Raises:
        StageError: unknown name, or weights that are missing, damaged or of another model.
    """
    if name not in _BUILDERS:
        raise StageError(f"--embedder: {name!r} is not one of {', '.join(EMBEDDERS)}")
    check_embedder(name, weights)
    return _BUILDERS[name](weights or DEFAULT_WEIGHTS.get(name), device)
