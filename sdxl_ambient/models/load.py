"""Loads the parts of an SDXL model, and says in one line why one can't be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_ambient.errors import ModelError, one_line
from sdxl_ambient.models import quantization
from sdxl_ambient.models.base import load_schedule
from sdxl_ambient.models.finite import check_finite
from sdxl_ambient.models.libraries import LOADING_ERRORS, in_precision
from sdxl_ambient.models.parts import load_config, load_part
from sdxl_ambient.models.single_file import TEXT_ENCODERS, clip_from_file, is_single_file, network_of
from sdxl_ambient.models.vae import load_vae

# Where the original layout's and diffusers' UNet files keep the UNet's weights.
_UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "")
_ORIGINAL_PREFIX = "model.diffusion_model."
_ANOTHER = "is incomplete, or of another architecture than that of"


def base_folder(base: str | Path, revision: str | None = None, variant: str | None = None) -> Path:
    """The base model's folder, or its single file; of one on the Hub, the folder in the cache, downloaded if need be.

    Raises:
        ModelError: one that can't be downloaded.
    """
    if Path(base).exists():
        return Path(base)
    try:
        return Path(DiffusionPipeline.download(str(base), revision=revision, variant=variant, use_safetensors=True))
    except LOADING_ERRORS as error:
        raise ModelError(f"{str(base)!r} can't be downloaded: {one_line(error)}") from None


def load_unet(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    quantize: str = "none",
    device: torch.device | str | None = None,
) -> UNet2DConditionModel:
    """The UNet from a pipeline (its ``unet`` folder), from a whole model's file, or from a folder that is a UNet itself.

    With ``quantize`` int8 or nf4 its attention blocks are put onto ``device`` in fewer bits, frozen, for a LoRA on top: see
    :func:`sdxl_ambient.models.quantization.quantize`.

    Raises:
        ModelError: one that is missing or damaged.
        OptionError: ``quantize`` isn't possible on this machine.
    """
    if is_single_file(name_or_path):
        unet, _ = _unet_of_file(name_or_path, name_or_path, dtype, revision)
    else:
        bare = Path(name_or_path).is_dir() and not (Path(name_or_path) / "unet").is_dir()
        unet = load_part(
            UNet2DConditionModel,
            name_or_path,
            "UNet",
            subfolder=None if bare else "unet",
            revision=revision,
            variant=variant,
            use_safetensors=True,
            **in_precision(dtype),
        )
    if quantize != "none":
        quantization.quantize(unet.requires_grad_(False), quantize, device)
    return unet


def load_unet_file(
    path: str | Path,
    base: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    prediction_type: str | None = None,
) -> UNet2DConditionModel:
    """The UNet of one .safetensors file, with the configuration of the ``base`` pipeline.

    The file is an SDXL checkpoint in the original layout (sgm, kohya, ComfyUI), whose text encoders and VAE are not read,
    or a UNet alone in that layout or in diffusers'. ``prediction_type`` stands in for what the base's scheduler says.

    Raises:
        ModelError: no UNet in it, one of another architecture, an incomplete one, or one that predicts another quantity.
    """
    unet, predicts_v = _unet_of_file(path, base, dtype, revision)
    # Such files say it by an empty tensor of this name. Sampled as ε, v gives noise, in which nothing is found copied.
    if predicts_v and load_schedule(base, revision, prediction_type).prediction_type != "v_prediction":
        raise ModelError(
            f"the UNet {str(path)!r} predicts v, but the scheduler of {str(base)!r} doesn't; give another base, or "
            "--prediction_type v_prediction"
        )
    return unet


def _unet_of_file(
    path: str | Path, base: str | Path, dtype: torch.dtype, revision: str | None
) -> tuple[UNet2DConditionModel, bool]:
    """The UNet in a file, and whether the file says that it predicts v."""
    try:
        weights, predicts_v = _unet_weights(Path(path))
    except LOADING_ERRORS as error:
        raise ModelError(f"the UNet {str(path)!r} can't be loaded: {one_line(error)}") from None
    source = f"the UNet {str(path)!r}"
    original = any(name.startswith(_ORIGINAL_PREFIX) for name in weights)
    try:
        config = load_config(UNet2DConditionModel, base, subfolder="unet", revision=revision)
        unet = network_of(UNet2DConditionModel, weights, config, convert_ldm_unet_checkpoint if original else None, dtype)
    except ModelError:
        raise
    except LOADING_ERRORS as error:
        raise ModelError(f"{source} {_ANOTHER} {str(base)!r}: {one_line(error)}") from None
    check_finite(unet.state_dict(), source)
    return unet, predicts_v


def _unet_weights(path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """The UNet's weights under the names that diffusers converts, or under its own; and whether the file says v."""
    with safe_open(str(path), "pt") as file:
        names = list(file.keys())
        if any("lora_" in n or ".lora." in n for n in names):
            raise ValueError("it is a LoRA, not a UNet")
        for prefix in _UNET_PREFIXES:
            original = any(n.startswith(f"{prefix}input_blocks.") for n in names)
            if original or any(n.startswith((f"{prefix}conv_in.", f"{prefix}down_blocks.")) for n in names):
                break
        else:
            raise ValueError("it holds no UNet's weights")
        kept = [n for n in names if n.startswith(prefix) and n != "v_pred" and n != "ztsnr"]
        new = _ORIGINAL_PREFIX if original else ""
        return {new + n.removeprefix(prefix): file.get_tensor(n) for n in kept}, "v_pred" in names


@dataclass
class Encoders:
    """What turns pictures and captions into what the UNet sees. Needed once, before training."""

    vae: AutoencoderKL
    tokenizers: tuple[Any, ...]
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]

    @property
    def networks(self) -> list[torch.nn.Module]:
        """The VAE and both text encoders."""
        return [self.vae, *self.text_encoders]

    def to(self, device: torch.device | str) -> Encoders:
        """Move all networks to a device. Returns self."""
        for network in self.networks:
            network.to(device)
        return self


def load_encoders(
    name_or_path: str,
    *,
    vae: str | None = None,
    text_dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
) -> Encoders:
    """VAE, both tokenizers and both text encoders, frozen, in evaluation mode.

    Args:
        name_or_path: a pipeline's folder, a name on the Hub, or a whole model's single file.
        vae: another VAE; see :func:`sdxl_ambient.models.vae.load_vae`.
        text_dtype: of the text encoders; the VAE is float32 always.

    Raises:
        ModelError: a part that is missing or damaged.
    """

    def load_tokenizer(part: str) -> Any:
        return load_part(AutoTokenizer, name_or_path, part, subfolder=part, revision=revision)

    def load_encoder(part: str) -> Any:
        return load_text_encoder(name_or_path, part, dtype=text_dtype, revision=revision, variant=variant)

    return Encoders(
        vae=load_vae(name_or_path, vae, revision=revision, variant=variant),
        tokenizers=(load_tokenizer("tokenizer"), load_tokenizer("tokenizer_2")),
        text_encoders=(load_encoder("text_encoder"), load_encoder("text_encoder_2")),
    )


def assemble_pipeline(
    base: str | Path,
    networks: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
) -> StableDiffusionXLPipeline:
    """A stock pipeline of these networks; those that aren't given are the base's, in ``dtype``.

    ``prediction_type``: what the UNet predicts, where the base's scheduler says another thing.

    Raises:
        ModelError: a part that is missing or damaged.
    """
    if is_single_file(base):
        pipe = _of_file(base, networks, dtype)
    else:
        pipe = load_part(
            StableDiffusionXLPipeline, base, "pipeline", use_safetensors=True, add_watermarker=False, revision=revision,
            variant=variant, **in_precision(dtype), **networks,
        )  # fmt: skip
    if prediction_type is not None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction_type)
    return pipe


def _of_file(base: str | Path, networks: dict[str, Any], dtype: torch.dtype) -> StableDiffusionXLPipeline:
    loaders: dict[str, Callable[[], Any]] = {
        "unet": lambda: load_unet(base, dtype=dtype),
        "vae": lambda: load_vae(base, dtype=dtype),
        **{part: functools.partial(load_text_encoder, base, part, dtype=dtype) for part in TEXT_ENCODERS},
        "scheduler": lambda: load_part(EulerDiscreteScheduler, base, "scheduler", subfolder="scheduler"),
        **{p: functools.partial(load_part, AutoTokenizer, base, p, subfolder=p) for p in ("tokenizer", "tokenizer_2")},
    }
    parts = {name: networks[name] if name in networks else load() for name, load in loaders.items()}
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)


def load_text_encoder(
    name_or_path: str | Path,
    part: str,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
) -> Any:
    """The text encoder ``text_encoder`` or ``text_encoder_2``, frozen, in evaluation mode.

    Raises:
        ModelError: one that is missing or damaged.
    """
    kind, what = {
        "text_encoder": (CLIPTextModel, "text encoder"),
        "text_encoder_2": (CLIPTextModelWithProjection, "second text encoder"),
    }[part]
    if is_single_file(name_or_path):
        encoder: Any = clip_from_file(kind, name_or_path, part, what, dtype)
    else:
        encoder = load_part(
            kind,
            name_or_path,
            what,
            subfolder=part,
            dtype=dtype,
            revision=revision,
            variant=variant,
            use_safetensors=True,
        )
    return encoder.requires_grad_(False).eval()
