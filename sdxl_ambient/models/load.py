"""Loads the parts of an SDXL model, and says in one line why one can't be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_ambient.errors import ModelError, one_line
from sdxl_ambient.models import quantization
from sdxl_ambient.noise import NoiseSchedule

_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
LOADING_ERRORS = (OSError, SafetensorError, ValueError, RuntimeError, LookupError)
# Where the original layout's and diffusers' UNet files keep the UNet's weights.
_UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "")
_ORIGINAL_PREFIX = "model.diffusion_model."
_ANOTHER = "is incomplete, or of another architecture than that of"


def check_sdxl(name_or_path: str, revision: str | None = None) -> dict:
    """Read the configurations only, and make sure that they are SDXL's. Returns the pipeline's ``model_index`` mapping.

    Raises:
        ModelError: no such model, or another architecture (SD 1.5, SDXL refiner, SD3, …).
    """
    try:
        index = dict(DiffusionPipeline.load_config(str(name_or_path), revision=revision))
        unet = UNet2DConditionModel.load_config(str(name_or_path), subfolder="unet", revision=revision)
    except LOADING_ERRORS as error:
        raise ModelError(f"{str(name_or_path)!r} is not a diffusers pipeline that can be read: {one_line(error)}") from None
    kind = index.get("_class_name")
    if kind not in _PIPELINES or unet.get("addition_embed_type") != "text_time":
        raise ModelError(f"{str(name_or_path)!r} holds a {kind}, not an SDXL model ({_PIPELINES[0]})")
    if index.get("text_encoder", [None])[0] is None:
        raise ModelError(f"{str(name_or_path)!r} has one text encoder only: the SDXL refiner can't be fine-tuned here")
    return index


def load_part(kind, name_or_path, what: str, **keywords):
    """``kind.from_pretrained`` with every failure turned into a one-line ModelError."""
    try:
        return kind.from_pretrained(str(name_or_path), **{k: v for k, v in keywords.items() if v is not None})
    except LOADING_ERRORS as error:
        raise ModelError(f"the {what} of {str(name_or_path)!r} can't be loaded: {one_line(error)}") from None


def in_precision(dtype: torch.dtype) -> dict:
    """The keyword for ``from_pretrained`` of diffusers, which took another name for it before 0.42."""
    recent = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42)
    return {"dtype" if recent else "torch_dtype": dtype}


def load_schedule(name_or_path: str, revision: str | None = None) -> NoiseSchedule:
    """The noise schedule of the base model's own scheduler."""
    scheduler = load_part(DDPMScheduler, name_or_path, "scheduler", subfolder="scheduler", revision=revision)
    return NoiseSchedule.from_scheduler(scheduler)


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

    With ``quantize`` int8 or nf4 its attention blocks are put onto ``device`` in fewer bits, frozen, for a LoRA on top (see
    :func:`sdxl_ambient.models.quantization.quantize`, also for the OptionError where that can't be).
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


def unet_file(path: str | Path) -> Path | None:
    """The one .safetensors file that ``path`` is, or that a training state holds in place of a UNet's folder; else None."""
    path = Path(path)
    if path.is_file():
        return path
    state = path / "model.safetensors"
    return state if state.is_file() and not any((path / p).exists() for p in ("unet", "config.json")) else None


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
    # Such files say it by an empty tensor of this name. Sampled as ε, v gives noise, in which nothing is found copied.
    if predicts_v and load_schedule(base, revision).prediction_type != "v_prediction":
        raise ModelError(f"the UNet {str(path)!r} predicts v, but the scheduler of {str(base)!r} doesn't; give another base")
    try:
        unet = UNet2DConditionModel.from_single_file(
            weights, config=str(base), subfolder="unet", config_revision=revision, **in_precision(dtype)
        )
    except (*LOADING_ERRORS, TypeError, AttributeError) as error:
        raise ModelError(f"the UNet {str(path)!r} {_ANOTHER} {str(base)!r}: {one_line(error)}") from None
    state = unet.state_dict()
    if len(weights) != len(state) or any(tensor.is_meta for tensor in state.values()):
        # diffusers leaves out what it doesn't know, and leaves empty what isn't there.
        raise ModelError(
            f"the UNet {str(path)!r} {_ANOTHER} {str(base)!r}: it holds {len(weights)} weights instead of {len(state)}"
        )
    return unet


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
    tokenizers: tuple
    text_encoders: tuple

    def to(self, device) -> Encoders:
        for module in (self.vae, *self.text_encoders):
            module.to(device)
        return self


def load_vae(
    name_or_path: str | Path, vae: str | None = None, *, revision: str | None = None, variant: str | None = None
) -> AutoencoderKL:
    """The base model's VAE, or ``vae``: a VAE's directory or one that holds it. Frozen.

    Always in float32: SDXL's own overflows in float16, and it runs once per picture.
    """
    where, sub = dict(revision=revision, variant=variant), "vae"
    if vae is not None:
        name_or_path, where, sub = vae, {}, "vae" if (Path(vae) / "vae").is_dir() else None
    how = dict(subfolder=sub, use_safetensors=True, **in_precision(torch.float32))
    return load_part(AutoencoderKL, name_or_path, "VAE", **how, **where).requires_grad_(False).eval()


def load_encoders(
    name_or_path: str,
    *,
    vae: str | None = None,
    text_dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
) -> Encoders:
    """VAE, both tokenizers and both text encoders, frozen, in evaluation mode."""
    where = dict(revision=revision)
    weights = dict(revision=revision, variant=variant, use_safetensors=True)
    encoders = Encoders(
        vae=load_vae(name_or_path, vae, revision=revision, variant=variant),
        tokenizers=tuple(
            load_part(AutoTokenizer, name_or_path, part, subfolder=part, **where) for part in ("tokenizer", "tokenizer_2")
        ),
        text_encoders=(
            load_part(CLIPTextModel, name_or_path, "text encoder", subfolder="text_encoder", dtype=text_dtype, **weights),
            load_part(
                CLIPTextModelWithProjection,
                name_or_path,
                "second text encoder",
                subfolder="text_encoder_2",
                dtype=text_dtype,
                **weights,
            ),
        ),
    )
    for module in encoders.text_encoders:
        module.requires_grad_(False).eval()
    return encoders
