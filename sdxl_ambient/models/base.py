"""Whether a base model is what its files say: SDXL for text to image, with noise that this project's algebra describes.

Only configurations are read, so that this comes before anything is downloaded whole, encoded or drawn. A base of another
kind trains without an error and to no end: its noise levels are not those of t_n, or its network predicts something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel

from sdxl_ambient.errors import ModelError, one_line
from sdxl_ambient.models.libraries import LOADING_ERRORS
from sdxl_ambient.models.parts import load_config, load_part
from sdxl_ambient.noise import PREDICTION_TYPES, NoiseSchedule
from sdxl_ambient.variants import only_variant

_TEXT_TO_IMAGE = "StableDiffusionXLPipeline"
_INPAINTING = "StableDiffusionXLInpaintPipeline"
_IMAGE_TO_IMAGE = "StableDiffusionXLImg2ImgPipeline"
# Families that add noise as DDPM does, x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε on betas, whatever they do when they sample.
DDPM_FAMILY = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDPM", "DDIM", "DDIMInverse", "DDIMParallel", "DDPMParallel", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete"),
        *("HeunDiscrete", "LMSDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep"),
        *("KDPM2Discrete", "KDPM2AncestralDiscrete", "UniPCMultistep", "SASolver", "LCM", "TCD"),
    )
)
_FEW_STEPS = frozenset({"LCMScheduler", "TCDScheduler"})
_DISTILLED = ("turbo", "lightning", "lcm", "hyper-sd", "hypersd", "dmd2", "few-step")
_BETAS = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")


def check_sdxl(
    name_or_path: str | Path,
    revision: str | None = None,
    log: Callable[[str], None] = lambda line: None,
    prediction_type: str | None = None,
) -> dict[str, Any]:
    """Read the configurations only, and make sure that they are those of an SDXL base. Returns the ``model_index`` mapping.

    Args:
        log: is told what is allowed and looks wrong.
        prediction_type: what the UNet predicts, where the scheduler is not to be asked.

    Raises:
        ModelError: no such model, another architecture (SD 1.5, the refiner, inpainting, SD3, …), or another kind of noise.
    """
    base = str(name_or_path)
    try:
        index = load_config(DiffusionPipeline, base, revision=revision)
        unet = load_config(UNet2DConditionModel, base, subfolder="unet", revision=revision)
        scheduler = load_config(DDPMScheduler, base, subfolder="scheduler", revision=revision)
    except ModelError:
        raise  # of a single file, which says what it is
    except LOADING_ERRORS as error:
        raise ModelError(f"{base!r} is not a diffusers pipeline that can be read: {one_line(error)}{_hint(base)}") from None
    try:
        _check_pipeline(base, index, unet)
        _check_unet(base, unet)
        _check_scheduler(base, with_prediction(scheduler, prediction_type))
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"the configuration of {base!r} is damaged: {one_line(error)}") from None
    if (why := _distilled(base, index, scheduler)) is not None:
        log(
            f"warning: the base {base!r} looks as if it were distilled for few steps ({why}). Fine-tuned on noise of all "
            "levels it loses that; fine-tune the model that it was made of, and use its distillation as a LoRA"
        )
    networks = ("unet", "vae", "text_encoder", "text_encoder_2") if Path(base).is_dir() else ()
    parts = [name for name in networks if only_variant(Path(base) / name)]
    if parts:
        log(f"note: the base {base!r} holds the variant {only_variant(Path(base) / parts[0])} alone of {', '.join(parts)}")
    return index


def unet_config(name_or_path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """The configuration of an SDXL model's UNet. Raises ModelError where it isn't SDXL."""
    check_sdxl(name_or_path, revision)
    return load_config(UNet2DConditionModel, name_or_path, subfolder="unet", revision=revision)


def with_prediction(scheduler: Mapping[str, Any], prediction_type: str | None) -> dict[str, Any]:
    """A scheduler's configuration, with what the UNet predicts where that is given."""
    return {**scheduler, **({} if prediction_type is None else {"prediction_type": prediction_type})}


def load_schedule(
    name_or_path: str | Path, revision: str | None = None, prediction_type: str | None = None
) -> NoiseSchedule:
    """The noise schedule of the base model's own scheduler; ``prediction_type`` stands in for what that says.

    Raises:
        ModelError: it can't be read, is of another family than DDPM's, or contradicts itself.
    """
    base = str(name_or_path)
    try:
        config = load_config(DDPMScheduler, base, subfolder="scheduler", revision=revision)
        _check_scheduler(base, with_prediction(config, prediction_type))
    except LOADING_ERRORS as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"the scheduler of {base!r} can't be loaded: {one_line(error)}") from None
    own = {"subfolder": "scheduler", "revision": revision, "prediction_type": prediction_type}
    scheduler = load_part(DDPMScheduler, base, "scheduler", **own)
    try:
        return NoiseSchedule.from_scheduler(scheduler)
    except (ValueError, TypeError) as error:
        raise ModelError(f"the scheduler of {base!r} can't be used: {one_line(error)}") from None


# -- what a base may be ------------------------------------------------------------------


def _check_pipeline(base: str, index: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    kind = index.get("_class_name")
    sdxl = unet.get("addition_embed_type") == "text_time"
    if kind == _INPAINTING or (sdxl and unet.get("in_channels") == 9):
        raise ModelError(
            f"{base!r} is an inpainting model, whose UNet reads a mask and a masked picture; give the text-to-image base"
        )
    if index.get("requires_aesthetics_score") or (sdxl and index.get("text_encoder", [None])[0] is None):
        raise ModelError(
            f"{base!r} has one text encoder only: the SDXL refiner can't be fine-tuned here; give the SDXL base"
        )
    if kind not in (_TEXT_TO_IMAGE, _IMAGE_TO_IMAGE) or not sdxl:
        raise ModelError(f"{base!r} holds a {kind}, not an SDXL model ({_TEXT_TO_IMAGE})")


def _check_unet(base: str, unet: Mapping[str, Any]) -> None:
    channels = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if channels != (4, 4):
        raise ModelError(f"the UNet of {base!r} has {channels[0]} channels in and {channels[1]} out; SDXL's has 4 and 4")
    if unet.get("time_cond_proj_dim") is not None:
        raise ModelError(
            f"the UNet of {base!r} is a consistency-distilled one (LCM), which reads the guidance scale; give the SDXL base"
        )


def _check_scheduler(base: str, config: Mapping[str, Any]) -> None:
    family, prediction = config.get("_class_name"), config.get("prediction_type", "epsilon")
    whose = f"the scheduler of {base!r}"
    flow = prediction == "flow_prediction" or config.get("use_flow_sigmas") or "FlowMatch" in str(family)
    if flow:
        raise ModelError(f"{whose} is one of flow matching ({family}), whose noise levels are not those of SDXL's t_n")
    if "EDM" in str(family) or config.get("timestep_type") == "continuous":
        raise ModelError(f"{whose} is EDM's ({family}), whose noise levels are not those of SDXL's t_n")
    if family is not None and family not in DDPM_FAMILY:
        raise ModelError(f"{whose} is a {family}, whose noise is not known to be DDPM's")
    if prediction not in PREDICTION_TYPES:
        raise ModelError(f"{whose}: prediction_type is {prediction!r}; allowed are {', '.join(PREDICTION_TYPES)}")
    lost = [name for name in _BETAS if config.get(name) is None] if config.get("trained_betas") is None else []
    if lost:
        raise ModelError(f"{whose} lacks {', '.join(lost)}, so its noise levels are unknown")
    if prediction == "epsilon" and config.get("rescale_betas_zero_snr"):
        raise ModelError(
            f"{whose} predicts ε and has rescale_betas_zero_snr, under which the last level has no signal and ε says "
            "nothing; such a base predicts v (prediction_type v_prediction)"
        )


def _distilled(base: str, index: Mapping[str, Any], scheduler: Mapping[str, Any]) -> str | None:
    """What tells that a base was distilled for few steps; None where nothing does."""
    if scheduler.get("_class_name") in _FEW_STEPS:
        return f"its scheduler is a {scheduler['_class_name']}"
    names = Path(base).name.lower(), str(index.get("_name_or_path", "")).lower()
    named = next((word for word in _DISTILLED if any(word in name for name in names)), None)
    if named is not None:
        return f"its name has {named!r}"
    if scheduler.get("_class_name") == "EulerAncestralDiscreteScheduler" and scheduler.get("timestep_spacing") == "trailing":
        return "its scheduler is set as SDXL-Turbo's"
    return None


def _hint(base: str) -> str:
    """What a folder that is no pipeline may be."""
    folder = Path(base)
    if not folder.is_dir():
        return ""
    if (folder / "unet/config.json").is_file():
        return (
            ". It looks like the output folder of a full fine-tune: give the base that it was trained from, and this as "
            "--unet, or make a pipeline of it (python -m sdxl_ambient.export)"
        )
    return ""
