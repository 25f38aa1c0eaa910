"""What the commands of the evaluation make of their options: the settings of library functions."""

from __future__ import annotations

from eval.attacks.settings import AttackSettings
from eval.evaluation import EvaluationSettings
from eval.options import MemorizationOptions
from eval.samplers import SamplerSettings
from eval.sets import SetSettings
from sdxl_ambient.config.settings import settings_of

# What a report repeats of its command.
_RECORDED = (
    "preset",
    "num_inference_steps",
    "guidance_scale",
    "resolution",
    "seed",
    "num_seeds",
    "num_images",
    "images_per_prompt",
    "sampler_t_n",
    "dtype",
    "lora_scale",
    "samplers",
    "worst_case",
    "worst_case_images",
    "prompts_file",
    "near_duplicates",
    "local_copies",
    "clip_score_model",
    "max_excess",
    "attacks",
    "attack_images",
    "attack_modes",
    "attack_prompts",
    "attack_steps",
    "mask_share",
)


def evaluation_settings(options: MemorizationOptions) -> EvaluationSettings:
    """The settings of a whole evaluation."""
    return settings_of(
        EvaluationSettings,
        options,
        sets=settings_of(SetSettings, options),
        samplers=settings_of(SamplerSettings, options),
        attack=settings_of(AttackSettings, options),
        attacks=not options.skip_attacks,
        models=options.models(),
        given=options.given(),
        recorded={name: getattr(options, name) for name in _RECORDED},
    )
