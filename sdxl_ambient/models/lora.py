"""Attach a LoRA to the UNet or the text encoders: which modules it goes on, how it starts, and what its base then is.

PiSSA and OLoRA start from a part B₀A₀ of the base's own weights and leave the base the rest, W − s·B₀A₀ (s is the LoRA's
scale). What is saved must act on the base as it was, so it is the LoRA of twice the rank that has the same effect there,

    s·BA − s·B₀A₀ = s·[B, −B₀]·[A; A₀],

which is exact, and from which a resume takes all four factors back bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from sdxl_ambient.errors import ModelError, one_line

# Module-name endings that a LoRA attaches to. Anything else given as a target is taken for such endings itself.
_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
_ATTENTION_FF = [*_ATTENTION, "ff.net.0.proj", "ff.net.2"]
_LINEAR = [*_ATTENTION_FF, "proj_in", "proj_out", "time_emb_proj"]
LORA_TARGETS = {
    "attention": _ATTENTION,
    "attention_ff": _ATTENTION_FF,
    "linear": _LINEAR,
    "all": [*_LINEAR, "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"],
}
_TEXT_ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"]
_TEXT_MLP = ["mlp.fc1", "mlp.fc2"]
# How a LoRA can start, and what peft is told of it. The others are started below, layer by layer in float32: peft rounds
# their factors to the base's dtype, in which orthogonal ones no longer multiply to nothing, and PiSSA's to another base.
INITS: dict[str, Any] = {"gaussian": "gaussian", "kaiming": True, "orthogonal": True, "pissa": True, "olora": True}
CHANGES_BASE = ("pissa", "olora")
_PISSA = "pissa_niter_16"  # the full decomposition takes minutes for SDXL, 16 iterations seconds
_FOR_LINEAR = ("orthogonal", *CHANGES_BASE)  # peft has them for linear layers alone


def lora_targets(targets: Sequence[str]) -> list[str]:
    """Preset names (see ``LORA_TARGETS``) or module-name endings → module-name endings."""
    return list(dict.fromkeys(name for target in targets for name in LORA_TARGETS.get(target, [target])))


def add_lora(
    unet: UNet2DConditionModel,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    dropout: float = 0.0,
    use_dora: bool = False,
    use_rslora: bool = False,
    init: str = "gaussian",
) -> None:
    """Freeze ``unet`` and attach one trainable float32 LoRA, named "default" as the diffusers examples do.

    Args:
        targets: names in ``LORA_TARGETS``, or endings of modules' names.
        dropout: of what goes into the LoRA, while it is trained.
        init: one of ``INITS``. In exact numbers the UNet's output is as before with each.

    Raises:
        ModelError: a target that no module of this UNet matches or that takes no LoRA, or a start that doesn't fit.
    """
    endings = lora_targets(targets)
    names = [name for name, _ in unet.named_modules()]
    unmatched = [e for e in endings if not any(_ends_with(n, e) for n in names)]
    # A preset lists what some SDXL-like UNet has; names that the user spelled out must be there.
    spelled_out = [e for e in unmatched if e in targets]
    if spelled_out or len(unmatched) == len(endings):
        raise ModelError(f"--lora_targets: no module of this UNet is named {', '.join(spelled_out or endings)}")
    endings = [e for e in endings if e not in unmatched]
    _check_start(unet, endings, rank, init, use_dora)
    _attach(unet, _config(rank, alpha, endings, dropout, use_dora, use_rslora, init), init)


def add_text_lora(
    text_encoders: Sequence[torch.nn.Module],
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = ("attention",),
    dropout: float = 0.0,
    use_dora: bool = False,
    use_rslora: bool = False,
    init: str = "gaussian",
) -> None:
    """Freeze both CLIP text encoders and attach a trainable float32 LoRA "default" to each.

    It goes on their attention, and on their MLPs where the UNet's ``targets`` have more than attention. The first encoder's
    last layer gets none: SDXL reads the layer before it, so no gradient would ever reach it. An encoder that has a LoRA
    already keeps it as it is.

    Args:
        init: as :func:`add_lora`'s, but "gaussian" in place of those that change the base, which only the UNet's does.

    Raises:
        ModelError: a start that doesn't fit.
    """
    init = "gaussian" if init in CHANGES_BASE else init
    more = set(lora_targets(targets)) - set(_ATTENTION)
    modules = [*_TEXT_ATTENTION, *(_TEXT_MLP if more else [])]
    for encoder in text_encoders:
        if getattr(encoder, "_hf_peft_config_loaded", False):
            continue
        layers = text_layers(encoder) - (encoder is not text_encoders[-1])
        endings = [f"layers.{i}.{module}" for i in range(layers) for module in modules]
        _check_start(encoder, endings, rank, init, use_dora)
        _attach(encoder, _config(rank, alpha, endings, dropout, use_dora, use_rslora, init), init)


def text_layers(encoder: Any) -> int:
    """How many layers a text encoder has."""
    return encoder.config.num_hidden_layers


def trainable_to_float32(module: torch.nn.Module) -> None:
    """Weights that the optimizer changes are kept in float32: half precision loses small updates, and can't be unscaled."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _config(
    rank: int, alpha: float, endings: list[str], dropout: float, use_dora: bool, use_rslora: bool, init: str
) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # any number, whatever peft declares
        lora_dropout=dropout,
        use_dora=use_dora,
        use_rslora=use_rslora,
        target_modules=endings,
        init_lora_weights=INITS[init],
    )


def _check_start(model: torch.nn.Module, endings: list[str], rank: int, init: str, use_dora: bool) -> None:
    if init not in INITS:
        raise ModelError(f"--init_lora_weights: {init!r} is not one of {', '.join(INITS)}")
    if init == "orthogonal" and rank % 2:
        raise ModelError(f"--rank: {rank} is odd; --init_lora_weights orthogonal needs an even one")
    if init in CHANGES_BASE and use_dora:
        raise ModelError(f"--init_lora_weights: {init!r} excludes --use_dora; allowed are gaussian, kaiming, orthogonal")
    if init not in _FOR_LINEAR:
        return
    for name, module in model.named_modules():
        if not any(_ends_with(name, e) for e in endings):
            continue
        if not isinstance(module, torch.nn.Linear):
            raise ModelError(
                f"--init_lora_weights: {init!r} needs linear targets, and {name} is a {type(module).__name__}; allowed with "
                "it are gaussian, kaiming"
            )
        if init in CHANGES_BASE and rank > min(module.in_features, module.out_features):
            raise ModelError(
                f"--rank: {rank} is more than --init_lora_weights {init} finds in {name}, which has "
                f"{module.in_features} inputs and {module.out_features} outputs"
            )


def _attach(model: Any, config: LoraConfig, init: str) -> None:
    model.requires_grad_(False)
    try:
        model.add_adapter(config, adapter_name="default")
    except ValueError as error:
        raise ModelError(f"--lora_targets: {one_line(error)}") from None
    trainable_to_float32(model)
    layers = _layers(model)
    if init == "orthogonal":
        for layer in layers.values():
            _orthogonal(layer)
    if init in CHANGES_BASE:
        # The same factors in a run and in its resume, whatever was drawn before.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            for layer in layers.values():
                if init == "pissa":
                    layer.pissa_init("default", _PISSA)
                else:
                    layer.olora_init("default")
        model.lora_initial = {n: w.detach().cpu().clone() for name, x in layers.items() for n, w in _factors(name, x)}


def _layers(model: torch.nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer) and "default" in m.lora_A}


def _factors(name: str, layer: Any) -> list[tuple[str, torch.Tensor]]:
    """A (rank, in) and B (out, rank), under peft's names in a state dict."""
    return [(f"{name}.lora_{k}.weight", getattr(layer, f"lora_{k}")["default"].weight) for k in "AB"]


@torch.no_grad()
def _orthogonal(layer: Any) -> None:
    """As peft's ``orthogonal_init``, always in float32: A and B are on orthogonal rows, so BA = 0 and both have gradients.

    datta0.github.io/posts/rethink-lora-init
    """
    (_, a), (_, b) = _factors("", layer)
    half = len(a) // 2
    rows = torch.linalg.qr(torch.randn(2 * half, 2 * half))[0]
    a.copy_((torch.randn(a.shape[1], half) @ rows[0::2]).T / 10)
    b.copy_(torch.randn(half, len(b)).T @ rows[1::2] / 10)


# -- a base that has lost a part to the LoRA ----------------------------------------------------------------------


def changes_base(model: torch.nn.Module) -> bool:
    """Whether a LoRA was started such that the model without it is not the base."""
    return getattr(model, "lora_initial", None) is not None


def on_the_base(
    model: Any, state: dict[str, torch.Tensor], config: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The LoRA that does to the original base what ``state`` does to ``model``'s: weights and peft's configuration.

    Args:
        state: the trained factors under peft's names, on the CPU.
        config: peft's configuration of them.
    """
    if not changes_base(model):
        return state, config
    initial = {name: tensor.to(state[name].dtype) for name, tensor in model.lora_initial.items()}
    joined = {
        name: torch.cat([tensor, initial[name]]) if ".lora_A." in name else torch.cat([tensor, -initial[name]], dim=1)
        for name, tensor in state.items()
    }
    # α/r, or α/√r with rsLoRA, stays what it was.
    factor = math.sqrt(2) if config["use_rslora"] else 2
    return joined, {**config, "r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"]}


def taken_apart(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What :func:`on_the_base` joined: the trained factors, and those that training started with."""
    trained, initial = {}, {}
    for name, tensor in state.items():
        first = ".lora_A." in name
        now, then = tensor.chunk(2, dim=0 if first else 1)
        trained[name], initial[name] = now.contiguous(), (then if first else -then).contiguous()
    return trained, initial


@torch.no_grad()
def rebase(model: Any, initial: dict[str, torch.Tensor]) -> int:
    """Leave in the base what it had left when training started with ``initial``. Returns how many layers that changed.

    None on the machine that training started on. Elsewhere a decomposition may differ in its last digits or its signs; the
    base is then right to its own precision.
    """
    changed = 0
    for name, layer in _layers(model).items():
        names = [n for n, _ in _factors(name, layer)]
        if all(torch.equal(model.lora_initial[n], initial[n]) for n in names):
            continue
        weight, changed = layer.get_base_layer().weight, changed + 1
        (a, b), (new_a, new_b) = ([d[n].to(weight.device).double() for n in names] for d in (model.lora_initial, initial))
        weight.copy_((weight.double() + layer.scaling["default"] * (b @ a - new_b @ new_a)).to(weight.dtype))
    model.lora_initial = {name: tensor.clone() for name, tensor in initial.items()}
    return changed
