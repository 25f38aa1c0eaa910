"""What is trained: the UNet, or a LoRA on it and perhaps on both text encoders; how it is shown captions and exported."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME

from sdxl_ambient.formats.attach import start_from
from sdxl_ambient.formats.peft import save_lora, save_unet
from sdxl_ambient.models.base import with_prediction
from sdxl_ambient.models.conditioning import encode_tokens
from sdxl_ambient.models.denoiser import Conditioning, Denoiser
from sdxl_ambient.models.load import load_encoders, load_unet
from sdxl_ambient.models.lora import add_lora, add_text_lora, trainable_to_float32
from sdxl_ambient.models.parts import load_config
from sdxl_ambient.models.prediction import check_prediction
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.provenance import write_json
from sdxl_ambient.store.batches import Batch
from sdxl_ambient.training.distributed import is_sharded
from sdxl_ambient.training.record import lora_record
from sdxl_ambient.training.weights import BaseModel, WeightSettings


@dataclass
class TrainableModel:
    """The modules that are trained, out of any distributed wrapper.

    dtype: of frozen weights and of what the UNet is shown. Weights that are trained are float32.
    record: what a resume must agree in.
    text_encoders: both, where they are trained; else empty.
    zero_empty: whether an empty caption is shown as zeros, as SDXL's own pipeline has it.
    scheduler: the configuration of the base's scheduler, which stands with a whole UNet.
    prepared: the modules as they are called, in their wrappers, the UNet first; empty before they are prepared.
    """

    unet: UNet2DConditionModel
    dtype: torch.dtype
    record: dict
    text_encoders: tuple = ()
    zero_empty: bool = True
    scheduler: dict = field(default_factory=dict)
    prepared: list[torch.nn.Module] = field(default_factory=list)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The UNet and the text encoders that are trained, out of their wrappers."""
        return [self.unet, *self.text_encoders]

    @property
    def wrapped(self) -> list[torch.nn.Module]:
        """The same as they are called."""
        return self.prepared or self.modules

    @property
    def names(self) -> dict[torch.nn.Parameter, str]:
        """The names of the weights that are trained."""
        return {p: name for module in self.modules for name, p in module.named_parameters() if p.requires_grad}

    @property
    def trained(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.names)

    def groups(self, text_encoder_lr: float | None, scale: float) -> list[dict]:
        """The optimizer's parameter groups: the UNet's, and the text encoders' with their own learning rate."""
        parts = [self.unet], self.text_encoders
        unet, text = ([p for module in part for p in module.parameters() if p.requires_grad] for part in parts)
        own = {} if text_encoder_lr is None else {"lr": text_encoder_lr * scale}
        return [{"params": unet}, *([{"params": text, **own}] if text else [])]

    def conditioning(self, batch: Batch, device) -> Conditioning:
        """What the UNet is shown of a batch: its stored embeddings, or, where the encoders are trained, new ones."""
        if not self.text_encoders:
            return batch.conditioning.to(device, self.dtype)
        assert batch.tokens is not None, "a store that text encoders are trained on has tokens"
        embeds, pooled = encode_tokens(batch.tokens, self.wrapped[1:], batch.dropped, zero_empty=self.zero_empty)
        return Conditioning(embeds, pooled, batch.conditioning.time_ids).to(device, self.dtype)

    def denoiser(self, batch: Batch, device) -> Denoiser:
        """The UNet as it is called, for a batch."""
        return Denoiser(self.wrapped[0], self.conditioning(batch, device), self.dtype)

    def export(self, folder: Path, info: dict, state: dict | None = None) -> Path:
        """Write what users load; ``state``: the UNet's whole state dict where it is spread over processes."""
        if self.record["finetune"] == "full":
            unet = save_unet(self.unet, folder, info, state=state)
            # What the UNet predicts, and on which noise, which its own configuration doesn't say.
            write_json(Path(folder) / "scheduler" / SCHEDULER_CONFIG_NAME, self.scheduler)
            return unet
        return save_lora(self.unet, folder, info, self.text_encoders or None, state=state)


def load_trainable(
    base: BaseModel, weights: WeightSettings, accelerator: Accelerator, schedule: NoiseSchedule, zero_empty: bool
) -> TrainableModel:
    """Load the UNet, and the text encoders where they are trained, and make them trainable.

    Raises:
        ModelError, InterchangeError: a part that can't be used, or a UNet that predicts another thing than ``schedule``
            says.
    """
    name, revision, variant = base.pretrained_model_name_or_path, base.revision, base.variant
    lora = weights.finetune == "lora"
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}
    # Frozen weights may be half; weights that are trained are float32 and autocast in the forward pass.
    dtype = half.get(accelerator.mixed_precision, torch.float32) if lora else torch.float32
    unet = load_unet(
        name, dtype=dtype, revision=revision, variant=variant, quantize=weights.quantize_base, device=accelerator.device
    )
    # Where training runs, since half precision is slow on a CPU; it goes there anyway, but for the share of a spread one.
    network = cast(torch.nn.Module, unet)  # diffusers wraps Module.to in a way that hides its arguments
    check_prediction(network.to(accelerator.device), schedule, repr(name), base.prediction_type)
    if is_sharded(accelerator):
        network.to("cpu")
    record = {"finetune": weights.finetune, **lora_record(weights)}
    own = load_config(DDPMScheduler, name, subfolder="scheduler", revision=revision)
    scheduler = with_prediction(own, base.prediction_type)
    trainable = TrainableModel(unet, dtype, record, zero_empty=zero_empty, scheduler=scheduler)
    if weights.train_text_encoder:
        encoders = load_encoders(name, text_dtype=dtype, revision=revision, variant=variant)
        trainable.text_encoders = encoders.text_encoders
    if not lora:
        trainable_to_float32(unet.requires_grad_(True))
    elif weights.lora is not None:
        trainable.record |= start_from(unet, weights.lora, trainable.text_encoders, dropout=weights.lora_dropout)
    else:
        add_lora(unet, **weights.lora_arguments)
    add_text_lora(trainable.text_encoders, **weights.lora_arguments)  # but to those that the file has given one
    if weights.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    for module in trainable.modules:
        if weights.gradient_checkpointing:
            names = ("enable_gradient_checkpointing", "gradient_checkpointing_enable")  # diffusers' and transformers'
            next(getattr(module, n) for n in names if hasattr(module, n))()
        module.train()
    return trainable
