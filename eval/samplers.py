"""The ways a model is sampled: what the user asked for, and the named set that its worst case is taken over.

Memorisation is a property of the weights: what a sampler hides, another one brings out. The set ``standard`` is

    full                     the stock pipeline
    early_stop, hybrid       where the data's t_n is known
    scale_0.5, scale_1.5     the adapter at half and at one and a half times its strength
    guidance_1, guidance_5   without guidance, and with SDXL's usual one
    mean_4                   the pixel mean of four samples of a prompt: what they share stays, what differs fades

and, beside the samplers, the attacks of :mod:`eval.attacks`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from eval.checkpoints import Checkpoint
from sdxl_ambient.errors import OptionError

SCALES, GUIDANCES, MEAN_OF = (0.5, 1.5), (1.0, 5.0), 4


@dataclass(frozen=True)
class Sampler:
    """One way to sample: ``t_n`` (timestep) is for ``early_stop`` and ``hybrid``, and ``mean_of`` samples of a prompt are
    averaged. ``num_images``, where it is given, stands for the run's own."""

    name: str
    mode: str = "full"
    t_n: int | None = None
    lora_scale: float | None = None
    guidance_scale: float = 5.0
    mean_of: int | None = None
    num_images: int | None = None

    def describe(self) -> dict:
        """For the report: what determines an image, the mode under ``sampler``."""
        settings = asdict(self)
        del settings["name"], settings["num_images"]
        return {"sampler": settings.pop("mode"), **settings}


@dataclass(frozen=True)
class SamplerSettings:
    """How models are sampled. Values of the options of these names."""

    samplers: list[str]
    sampler_t_n: int | None
    lora_scale: float
    guidance_scale: float
    num_inference_steps: int
    worst_case: str
    worst_case_images: int | None


def own_samplers(checkpoint: Checkpoint, settings: SamplerSettings) -> list[Sampler]:
    """What the user asked for: ``settings.samplers`` at the given guidance and scale; for the base model ``full`` alone.

    Raises OptionError where a noise level is needed and neither given nor recorded.
    """
    level = settings.sampler_t_n if settings.sampler_t_n is not None else checkpoint.t_n()
    modes = settings.samplers if checkpoint.lora or checkpoint.unet else ["full"]
    for mode in modes:
        if mode != "full" and level is None:
            raise OptionError(
                f"--sampler_t_n: needed for the sampler {mode!r}, since {checkpoint.name!r} records no noise level"
            )
    scale, guidance = settings.lora_scale if checkpoint.lora else None, settings.guidance_scale
    return [Sampler(mode, mode, level if mode != "full" else None, scale, guidance) for mode in modes]


def worst_case(checkpoint: Checkpoint, settings: SamplerSettings, first: int = 1000) -> list[Sampler]:
    """The samplers of the set ``standard`` that apply to a model and change something for it.

    ``first`` is the timestep that sampling starts from: a level that is not below it leaves nothing to stop or hand over.
    """
    tuned = checkpoint.lora or checkpoint.unet
    level = settings.sampler_t_n if settings.sampler_t_n is not None else checkpoint.t_n()
    scale, guidance = settings.lora_scale if checkpoint.lora else None, settings.guidance_scale
    samplers = [Sampler("full", lora_scale=scale, guidance_scale=guidance)]
    if tuned and level is not None and level < first:
        samplers += [Sampler(mode, mode, level, scale, guidance) for mode in ("early_stop", "hybrid")]
    if checkpoint.lora:
        samplers += [Sampler(f"scale_{s:g}", lora_scale=s, guidance_scale=guidance) for s in SCALES if s != scale]
    samplers += [Sampler(f"guidance_{g:g}", lora_scale=scale, guidance_scale=g) for g in GUIDANCES if g != guidance]
    samplers.append(Sampler(f"mean_{MEAN_OF}", lora_scale=scale, guidance_scale=guidance, mean_of=MEAN_OF))
    return samplers


def samplers_of(checkpoint: Checkpoint, settings: SamplerSettings, first: int = 1000) -> list[Sampler]:
    """All samplers of a model, the user's own first, each name once.

    ``first`` is the timestep that sampling starts from. Raises OptionError for an own sampler whose level is not below it.
    """
    samplers = own_samplers(checkpoint, settings)
    for s in samplers:
        if s.t_n is not None and s.t_n >= first:
            raise OptionError(
                f"--sampler_t_n: {s.t_n} of {checkpoint.name!r} is not below {first}, where {settings.num_inference_steps} "
                f"steps start, which the sampler {s.mode!r} needs"
            )
    if settings.worst_case == "standard":
        names = {s.name for s in samplers}
        more = [s for s in worst_case(checkpoint, settings, first) if s.name not in names]
        samplers += [replace(s, num_images=settings.worst_case_images) for s in more]
    return samplers
