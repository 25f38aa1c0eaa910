"""Training whose weights are spread over processes: FSDP2 and DeepSpeed, through Accelerate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import DistributedType

from sdxl_ambient.errors import OptionError

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
# What swaps weights in place, holds a second set of them, or trains more than one module.
_EXCLUDED = {
    "use_ema": (True,),
    "train_text_encoder": (True,),
    "fused_backward_pass": (True,),
    "low_noise": ("restore",),
    "consistency_teacher": ("ema",),
    "quantize_base": ("int8", "nf4"),
    "init_lora_weights": ("pissa", "olora"),
    "optimizer": ("adamw_schedulefree",),
}


@dataclass(frozen=True)
class ShardingSettings:
    """What weights that are spread over processes may exclude. Values of the options of these names."""

    use_ema: bool
    train_text_encoder: bool
    fused_backward_pass: bool
    low_noise: str
    consistency_teacher: str
    quantize_base: str
    init_lora_weights: str
    optimizer: str


def is_sharded(accelerator) -> bool:
    """Whether no process holds all weights."""
    return accelerator.distributed_type in _SHARDED


def check_sharding(settings: ShardingSettings, accelerator) -> None:
    """Raises OptionError for what can't be had with weights that are spread over processes."""
    if not is_sharded(accelerator):
        return
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    for name, values in _EXCLUDED.items():
        if (value := getattr(settings, name)) in values:
            shown = "true" if value is True else repr(value)
            raise OptionError(f"--{name}: {shown} can't be had with {kind}, which spreads the weights; leave it out")
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin is not None and plugin.fsdp_version != 2:
        raise OptionError("accelerate's fsdp_version: 1 is not supported; allowed is 2 (configs/accelerate/fsdp.yaml)")


def tell_deepspeed(accelerator, *, batch_size: int, samples_per_step: int, max_grad_norm: float) -> None:
    """DeepSpeed wants to know the batch before it sees one, clips gradients by itself, and splits every transformers model
    that is loaded while it is on, also those that only encode."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    accelerator.state.deepspeed_plugin.deepspeed_config.update(
        train_micro_batch_size_per_gpu=batch_size, train_batch_size=samples_per_step, gradient_clipping=max_grad_norm
    )


def full_state(accelerator, model) -> dict[str, torch.Tensor] | None:
    """All weights of a prepared ``model`` on the main process, {} on the others; None where the module itself has them.

    Every process calls it.
    """
    if not is_sharded(accelerator):
        return None
    # DeepSpeed gives parts of a larger buffer, which can't be saved without it.
    state = accelerator.get_state_dict(model) or {}
    return {name: w.clone() if w.untyped_storage().nbytes() > w.nbytes else w for name, w in state.items()}


def as_number(norm) -> float | None:
    """A gradient norm, which may be a tensor that is spread over processes, as a number."""
    if norm is None:
        return None
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
