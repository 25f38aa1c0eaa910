"""Settings of the attacks."""

from __future__ import annotations

from dataclasses import dataclass

from eval.choices import ATTACK_MODES, ATTACKS
from eval.shared_options import GenerationOptions
from sdxl_ambient.config.parser import option
from sdxl_ambient.errors import OptionError


@dataclass
class AttackOptions(GenerationOptions):
    """Attacks"""

    attacks: list[str] = option(list(ATTACKS), "how the weights are asked", choices=ATTACKS)
    attack_t: list[int] = option([500, 700, 900], "timesteps that images are noised to", minimum=1, maximum=999)
    attack_modes: list[str] = option(["one_step", "posterior"], "how they are denoised", choices=ATTACK_MODES)
    attack_steps: int = option(25, "steps of a posterior sample, of inpainting and of the magnitude", minimum=1)
    attack_prompts: str = option("caption", "what the model is told of an image", choices=("caption", "none"))
    attack_images: int = option(128, "images of each set, at most, taken evenly", minimum=2)
    mask_share: float = option(0.5, "side of the hole of the mask attack over the image's", above=0.0)

    def check_generation(self) -> None:
        super().check_generation()
        if not self.attacks:
            raise OptionError(f"--attacks: give at least one of {', '.join(ATTACKS)}")
        if self.mask_share >= 1:
            raise OptionError(f"--mask_share: {self.mask_share} is not below 1")
