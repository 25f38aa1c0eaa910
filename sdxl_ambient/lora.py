"""Attach a LoRA: which modules it goes on, and how it starts."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from sdxl_ambient.models import ModelError

# Module-name endings that a LoRA attaches to. Anything else given as a target is taken for such endings itself.
_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
_LINEAR = [*_ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "time_emb_proj"]
LORA_TARGETS = {
    "attention": _ATTENTION,
    "linear": _LINEAR,
    "all": [*_LINEAR, "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"],
}


def lora_targets(targets: list[str]) -> list[str]:
    """Preset names (``attention``, ``linear``, ``all``) or module-name endings → module-name endings."""
    return list(dict.fromkeys(name for target in targets for name in LORA_TARGETS.get(target, [target])))


def add_lora(
    unet: UNet2DConditionModel,
    *,
    rank: int,
    alpha: float,
    targets: list[str],
    dropout: float = 0.0,
    use_dora: bool = False,
) -> None:
    """Freeze ``unet`` and attach one trainable float32 LoRA, named "default" as the diffusers examples do.

    Raises:
        ModelError: a target that no module of this UNet matches.
    """
    endings = lora_targets(targets)
    names = [name for name, _ in unet.named_modules()]
    unmatched = [e for e in endings if not any(n == e or n.endswith("." + e) for n in names)]
    # A preset lists what some SDXL-like UNet has; names that the user spelled out must be there.
    spelled_out = [e for e in unmatched if e in targets]
    if spelled_out or len(unmatched) == len(endings):
        raise ModelError(f"--lora_targets: no module of this UNet is named {', '.join(spelled_out or endings)}")
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=[e for e in endings if e not in unmatched],
            lora_dropout=dropout,
            use_dora=use_dora,
            init_lora_weights="gaussian",
        )
    )
    trainable_to_float32(unet)


def trainable_to_float32(module: torch.nn.Module) -> None:
    """Weights that the optimizer changes are kept in float32: half precision loses small updates, and can't be unscaled."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
