"""Loads the parts of an SDXL model, and says in one line why one can't be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_ambient.errors import ModelError, one_line
from sdxl_ambient.models import quantization
from sdxl_ambient.models.base import load_schedule
from sdxl_ambient.models.finite import check_finite
from sdxl_ambient.models.parts import LOADING_ERRORS, in_precision, load_config, load_part
from sdxl_ambient.models.vae import load_vae

# Where the original layout's and diffusers' UNet files keep the UNet's weights.
_UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "")
_ORIGINAL_PREFIX = "model.diffusion_model."
_ANOTHER = "is incomplete, or of another architecture than that of"


def base_folder(base: str | Path, revision: str | None = None, variant: str | None = None) -> Path:
    """The base model's folder; of one on the Hub, that in the cache, into which it is downloaded if need be.

    Raises:
        ModelError: one that can't be downloaded.
    """
    if Path(base).is_dir():
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
    """The UNet from a pipeline (its ``unet`` folder) or from a folder that is a UNet itself.

    With ``quantize`` int8 or nf4 its attention blocks are put onto ``device`` in fewer bits, frozen, for a LoRA on top: see
    :func:`sdxl_ambient.models.quantization.quantize`.

    Raises:
        ModelError: one that is missing or damaged.
        OptionError: ``quantize`` isn't possible on this machine.
    """
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
    path: str | Path, base: str | Path, *, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> UNet2DConditionModel:
    """The UNet of one .safetensors file, with the configuration of the ``base`` pipeline.

    The file is an SDXL checkpoint in the original layout (sgm, kohya, ComfyUI), whose text encoders and VAE are not read,
    or a UNet alone in that layout or in diffusers'.

    Raises:
        ModelError: no UNet in it, one of another architecture, an incomplete one, or one that predicts another quantity.
    """
    try:
        weights, predicts_v = _unet_weights(Path(path))
    except LOADING_ERRORS as error:
        raise ModelError(f"the UNet {str(path)!r} can't be loaded: {one_line(error)}") from None
    _check_names(weights, str(path), base, revision)
    # Such files say it by an empty tensor of this name. Sampled as ε, v gives noise, in which nothing is found copied.
    if predicts_v and load_schedule(base, revision).prediction_type != "v_prediction":
        raise ModelError(f"the UNet {str(path)!r} predicts v, but the scheduler of {str(base)!r} doesn't; give another base")
    try:
        unet = UNet2DConditionModel.from_single_file(
            weights,  # pyright: ignore[reportArgumentType]  # diffusers documents a dictionary, and declares a string
            config=str(base),
            subfolder="unet",
            config_revision=revision,
            **in_precision(dtype),
        )
    except LOADING_ERRORS as error:
        raise ModelError(f"the UNet {str(path)!r} {_ANOTHER} {str(base)!r}: {one_line(error)}") from None
    state = unet.state_dict()
    # diffusers leaves out what it doesn't know, and leaves empty what isn't there.
    missing = sorted(name for name, tensor in state.items() if tensor.is_meta)
    if missing or len(weights) != len(state):
        counts = f"it holds {len(weights)} weights instead of {len(state)}"
        named = f", {missing[0]} is missing" if missing else ""
        raise ModelError(f"the UNet {str(path)!r} {_ANOTHER} {str(base)!r}: {counts}{named}")
    check_finite(state, f"the UNet {str(path)!r}")
    return unet


def _check_names(weights: dict[str, torch.Tensor], path: str, base: str | Path, revision: str | None) -> None:
    """A file in diffusers' layout holds just the weights of the base's UNet; diffusers takes any other for another layout.

    Raises:
        ModelError: it doesn't.
    """
    if any(name.startswith(_ORIGINAL_PREFIX) for name in weights):
        return
    try:
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(
                load_config(UNet2DConditionModel, base, subfolder="unet", revision=revision)
            )
    except LOADING_ERRORS as error:
        raise ModelError(f"the UNet of {str(base)!r} can't be read: {one_line(error)}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    have = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if other := sorted(name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name)):
        name = other[0]
        problem = "missing" if name not in have else "unknown" if name not in wanted else "of another shape"
        raise ModelError(f"the UNet {path!r} {_ANOTHER} {str(base)!r}: {len(other)} weights differ, {name} is {problem}")


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
