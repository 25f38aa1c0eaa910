"""Sampling from a stock ``StableDiffusionXLPipeline``: all the way, stopped at the data's level, or handed to the base.

``full``        the pipeline as it is.
``early_stop``  down to exactly t_n, then one x̂_0: the levels below, where an ambient model had no data, are not used.
``hybrid``      the fine-tuned weights for t > t_n and the base model's at and below, which then stay exactly the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from sdxl_ambient.errors import ModelError
from sdxl_ambient.formats.find import unet_file
from sdxl_ambient.formats.load_lora import load_lora
from sdxl_ambient.formats.names import LORA_PARTS
from sdxl_ambient.formats.record import read_training_info
from sdxl_ambient.models.base import check_sdxl
from sdxl_ambient.models.load import assemble_pipeline, base_folder, load_text_encoder, load_unet, load_unet_file
from sdxl_ambient.models.parts import load_part
from sdxl_ambient.models.vae import load_vae

SAMPLERS = ("full", "early_stop", "hybrid")
_NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


def load_pipeline(
    pretrained_model_name_or_path: str,
    *,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    unet: str | Path | None = None,
    vae: str | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
) -> StableDiffusionXLPipeline:
    """A stock SDXL pipeline from a folder, a file or the Hub, with a LoRA or a fully fine-tuned UNet put in, on the CPU.

    Args:
        lora: a .safetensors file in peft's, diffusers' or kohya's format, or a directory with one; see
            :func:`sdxl_ambient.formats.load_lora.load_lora`.
        lora_scale: by which the LoRA's effect is multiplied.
        unet: a ``unet`` directory, a directory that holds one, or a .safetensors file: a UNet's weights, or a whole SDXL
            checkpoint in the original layout (kohya, ComfyUI), whose UNet is used with the base's text encoders and VAE.
        vae: another VAE; the stock one overflows in float16.
        prediction_type: what the UNet predicts, where the base's scheduler says another thing.

    Raises:
        ModelError: not an SDXL model, files that are missing or damaged, or a LoRA that can't be loaded whole.
        ValueError: both ``lora`` and ``unet``.
    """
    if lora is not None and unet is not None:
        raise ValueError("give a LoRA or a fully fine-tuned UNet, not both")
    check_sdxl(pretrained_model_name_or_path, revision, prediction_type=prediction_type)
    folder = base_folder(pretrained_model_name_or_path, revision, variant)
    parts: dict[str, torch.nn.Module] = {}
    if unet is not None:
        file = unet_file(unet)
        if file is None:
            parts["unet"] = load_unet(unet, dtype=dtype)
        else:
            parts["unet"] = load_unet_file(file, folder, dtype=dtype, prediction_type=prediction_type)
    if vae is not None:
        parts["vae"] = load_vae(folder, vae, dtype=dtype)
    if folder.is_dir():
        # Its own loader draws weights that are missing at random, and looks at none: it gets all networks from ours.
        parts |= _base_networks(folder, dtype, variant, [name for name in _NETWORKS if name not in parts])
    pipe = assemble_pipeline(folder, parts, dtype=dtype, prediction_type=prediction_type)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        load_lora(pipe, lora, lora_scale)
    return pipe


def _base_networks(
    folder: Path, dtype: torch.dtype, variant: str | None, names: Sequence[str]
) -> dict[str, torch.nn.Module]:
    """The base's own networks, whole and finite. One without a file of the variant is taken without it, as diffusers does.

    Raises:
        ModelError: one that is missing or damaged, or a variant that none of them has.
    """
    having = [name for name in _NETWORKS if any(f".{variant}" in f.name for f in (folder / name).glob("*.safetensors"))]
    if variant is not None and not having:
        raise ModelError(f"the pipeline of {str(folder)!r} can't be loaded: it holds no files of the variant {variant!r}")
    networks: dict[str, torch.nn.Module] = {}
    for name in names:
        own = variant if name in having else None
        if name == "unet":
            networks[name] = load_unet(folder, dtype=dtype, variant=own)
        elif name == "vae":
            networks[name] = load_vae(folder, dtype=dtype, variant=own)
        else:
            networks[name] = load_text_encoder(folder, name, dtype=dtype, variant=own)
    return networks


def adapter_t_n(path: str | Path) -> int | None:
    """The noise level t_n (timestep) that an adapter or UNet was trained at.

    None for clean data, for images of several levels, and for an unknown history.
    """
    t_n = read_training_info(path).get("t_n")
    return t_n if isinstance(t_n, int) else None


# -- sampling ----------------------------------------------------------------------


@torch.no_grad()
def sample(
    pipe: StableDiffusionXLPipeline,
    prompts: Sequence[str],
    *,
    sampler: str = "full",
    t_n: int | None = None,
    base_unet: torch.nn.Module | None = None,
    generators: Sequence[torch.Generator],
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    height: int | None = None,
    width: int | None = None,
    negative_prompts: Sequence[str] | None = None,
    output_type: str = "pil",
) -> Any:
    """Draw one image per prompt, each from its own generator, so that a batch's size doesn't change any image.

    Args:
        t_n: the timestep at which ``early_stop`` stops and ``hybrid`` hands over.
        base_unet: for ``hybrid`` with a fully fine-tuned UNet, the base model's; a LoRA is switched off instead.
        height, width: pixels; by default the model's own size.
        output_type: "pil" for a list of images, "latent" for a tensor (batch, 4, h, w), as in diffusers.

    Raises:
        ValueError: an unknown sampler, a missing or impossible t_n, or nothing to hand over to.
    """
    if len(generators) != len(prompts):
        raise ValueError(f"{len(generators)} generators for {len(prompts)} prompts")
    arguments: dict[str, Any] = {
        "prompt": list(prompts),
        "negative_prompt": list(negative_prompts) if negative_prompts else None,
        "generator": list(generators),
        "latents": _initial_noise(pipe, generators, height, width),
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "output_type": output_type,
    }
    if sampler == "full":
        return _images(pipe, arguments, num_inference_steps=num_inference_steps)
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: {sampler!r} is not one of {', '.join(SAMPLERS)}")
    if t_n is None:
        raise ValueError(f"sampler {sampler!r} needs the noise level t_n; clean-trained weights record none")
    run = _early_stop if sampler == "early_stop" else _hybrid
    own_scheduler: Any = pipe.scheduler
    pipe.scheduler = euler = euler_like(own_scheduler)
    try:
        grid = timestep_grid(euler, num_inference_steps)
        return run(pipe, arguments, grid, t_n, base_unet)
    finally:
        pipe.scheduler = own_scheduler


def _images(pipe: Any, arguments: dict[str, Any], **more: Any) -> Any:
    """What the pipeline draws."""
    return pipe(**arguments, **more).images


def _initial_noise(pipe: Any, generators: Sequence[torch.Generator], height: int | None, width: int | None) -> torch.Tensor:
    """What the pipeline would draw in float32, each image's from its own generator: (batch, 4, h, w).

    Drawn in half precision, as the pipeline does for half weights, the numbers are others in some versions of torch.
    """
    sides = [(side or pipe.default_sample_size * pipe.vae_scale_factor) // pipe.vae_scale_factor for side in (height, width)]
    shape = (1, pipe.unet.config.in_channels, *sides)
    noise = [torch.randn(shape, generator=g, device=g.device, dtype=torch.float32) for g in generators]
    return torch.cat([n.to(pipe.unet.device) for n in noise]).to(pipe.unet.dtype)


def euler_like(scheduler: Any) -> EulerDiscreteScheduler:
    """The Euler sampler of the same noise schedule, for lists of timesteps.

    Its last step, to σ = 0, is exactly x̂_0, which is what ``early_stop`` ends with; other samplers do not all take a list
    of timesteps, nor end so.
    """
    euler: Any = EulerDiscreteScheduler.from_config(
        scheduler.config,
        use_karras_sigmas=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        interpolation_type="linear",
        timestep_type="discrete",
        final_sigmas_type="zero",
    )
    return euler


def timestep_grid(scheduler: EulerDiscreteScheduler, num_inference_steps: int) -> list[int]:
    """The timesteps that the scheduler would take in so many steps, high to low."""
    scheduler.set_timesteps(num_inference_steps)
    return [int(round(float(t))) for t in scheduler.timesteps]


def first_timestep(base: str | Path, num_inference_steps: int) -> int:
    """The timestep that sampling from a local base model starts at. Raises ModelError for a damaged scheduler."""
    scheduler = load_part(EulerDiscreteScheduler, base, "scheduler", subfolder="scheduler")
    return timestep_grid(euler_like(scheduler), num_inference_steps)[0]


def _check_level(t_n: int, grid: Sequence[int], num_train_timesteps: int) -> None:
    if not 0 <= t_n < num_train_timesteps:
        raise ValueError(f"t_n: {t_n} is not a timestep of this model, 0 to {num_train_timesteps - 1}")
    if t_n >= grid[0]:
        raise ValueError(f"t_n: {t_n} is not below the sampler's first timestep, {grid[0]}; nothing would be drawn above it")


def _early_stop(pipe: Any, arguments: dict[str, Any], grid: list[int], t_n: int, base_unet):
    _check_level(t_n, grid, pipe.scheduler.config.num_train_timesteps)
    return _images(pipe, arguments, timesteps=[t for t in grid if t > t_n] + [t_n])


def _hybrid(pipe: Any, arguments: dict[str, Any], grid: list[int], t_n: int, base_unet):
    _check_level(t_n, grid, pipe.scheduler.config.num_train_timesteps)
    replaced = pipe.unet if base_unet is not None else None
    adapted = [m for m in _models(pipe) if getattr(m, "peft_config", None) and m is not replaced]
    merged = getattr(pipe, "merged_change", None)
    if base_unet is None and not adapted and merged is None:
        raise ValueError("sampler 'hybrid' needs a LoRA to switch off, or the base model's UNet to hand over to")
    # t_n itself becomes a step, so that the fine-tuned weights act on (t_n, T) and nowhere else.
    timesteps = sorted({*grid, t_n}, reverse=True)
    last_above = max(i for i, t in enumerate(timesteps) if t > t_n)
    tuned = pipe.unet

    def hand_over(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        if step != last_above:
            return tensors
        if base_unet is not None:
            pipe.unet = base_unet
        for model in adapted:
            model.disable_adapters()
        if merged is not None:
            merged.remove()
        # Below t_n the prompt, too, is the base model's.
        reads = any(model is not pipe.unet for model in adapted) or (merged is not None and merged.parts != {"unet"})
        return {**tensors, **_encoded(pipe, arguments)} if reads else tensors

    try:
        return _images(pipe, arguments, timesteps=timesteps, callback_on_step_end=hand_over)
    finally:
        pipe.unet = tuned
        for model in adapted:
            model.enable_adapters()
        if merged is not None:
            merged.apply(merged.scale)


def _models(pipe: Any) -> list[Any]:
    return [getattr(pipe, part) for part in LORA_PARTS]


def _encoded(pipe: Any, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The prompts as the text encoders read them now, under the names that the pipeline's loop has for them."""
    guided = pipe.do_classifier_free_guidance
    prompt, negative, pooled, negative_pooled = pipe.encode_prompt(
        arguments["prompt"], negative_prompt=arguments["negative_prompt"], do_classifier_free_guidance=guided
    )
    if guided:
        prompt, pooled = torch.cat([negative, prompt]), torch.cat([negative_pooled, pooled])
    return {"prompt_embeds": prompt, "add_text_embeds": pooled}
