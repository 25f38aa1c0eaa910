"""How the attacks ask a model."""

from __future__ import annotations

from dataclasses import dataclass

from eval.drawing import GenerationSettings


@dataclass(frozen=True)
class AttackSettings(GenerationSettings):
    """Values of the options of these names."""

    attacks: list[str]
    attack_t: list[int]
    attack_modes: list[str]
    attack_steps: int
    attack_prompts: str
    attack_images: int
    mask_share: float
