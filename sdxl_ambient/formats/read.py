"""Files of a LoRA in any layout → :class:`sdxl_ambient.formats.adapter.Adapter`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from sdxl_ambient.errors import CheckpointError, InterchangeError, one_line
from sdxl_ambient.formats.adapter import Adapter, Weights
from sdxl_ambient.formats.find import lora_file
from sdxl_ambient.formats.names import KOHYA_PREFIXES, LAYOUTS, LORA_PARTS, unet_names, unet_shapes
from sdxl_ambient.formats.record import lora_metadata, public_info, read_training_info

_TENSORS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha", "dora_scale": "magnitude"}
# What follows a module's name: in peft, in diffusers' training scripts, and in its first ones, which named attention's
# processors (``attn1.processor.to_q_lora.down.weight``).
_ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    **{f"{lora}.{kind}.weight": kind for lora in (".lora", ".lora_linear_layer", "_lora") for kind in ("down", "up")},
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
# The attention processors' names of what has another name as a module, in the UNet and in text encoders.
_PROCESSORS = {
    "unet": {"to_out": "to_out.0"},
    "text": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}
_TEXT_MODULE = re.compile(r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
_KOHYA_TEXT_MODULE = re.compile(r"text_model_encoder_layers_(\d+)_(self_attn|mlp)_((?:q|k|v|out)_proj|fc[12])")
# What of peft's configuration says that a module does more than up·down, and the value with which it doesn't.
_PLAIN = {"lora_bias": False, "fan_in_fan_out": False, "modules_to_save": None, "layer_replication": None}
_PLAIN |= {"trainable_token_indices": None, "target_parameters": None, "use_qalora": False, "use_bdlora": None}


def read_adapter(lora: str | Path, config: Mapping | None = None) -> Adapter:
    """A LoRA in peft's, diffusers' or kohya's format (either layout), from a .safetensors file or a folder with one.

    diffusers' names may be its present ones or those of its first versions.

    Args:
        config: the configuration of the UNet that it is for; by default SDXL's own.

    Raises:
        InterchangeError: unreadable, another kind of adapter or for another architecture, incomplete, or of unknown
            strength.
    """
    file = lora_file(lora)
    try:
        state, metadata, info = load_file(str(file)), lora_metadata(file), public_info(read_training_info(file))
    except CheckpointError as error:
        raise InterchangeError(str(error)) from None
    except (OSError, SafetensorError) as error:
        raise InterchangeError(f"{file} can't be read: {one_line(error)}") from None
    kohya = any(name.startswith("lora_") for name in state)
    try:
        parts = _from_kohya(state, config) if kohya else _from_peft(state, metadata)
        for part, modules in parts.items():
            for name, weights in modules.items():
                _check(part, name, weights, config)
        _check_dora(parts)
    except InterchangeError as error:
        raise InterchangeError(f"{file}: {error}") from None
    return Adapter({part: dict(sorted(modules.items())) for part, modules in parts.items()}, info)


def _from_peft(state: dict[str, torch.Tensor], metadata: dict) -> dict[str, dict[str, Weights]]:
    modules: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        part, module, kind = _peft_name(name)
        tensors = modules.setdefault((part, module), {})
        if kind in tensors:
            raise InterchangeError(f"{part}.{module} has two {kind} weights; the file mixes two layouts")
        tensors[kind] = tensor
    parts: dict[str, dict[str, Weights]] = {}
    for (part, module), tensors in modules.items():
        _check_pair(f"{part}.{module}", tensors)
        config = {k.removeprefix(f"{part}."): v for k, v in metadata.items() if k.startswith(f"{part}.")}
        _check_plain(part, config)
        magnitude = tensors["magnitude"].reshape(-1) if "magnitude" in tensors else None
        alpha = _peft_alpha(part, module, len(tensors["down"]), config)
        parts.setdefault(part, {})[module] = Weights(tensors["down"], tensors["up"], alpha, magnitude)
    return _in_order(parts)


def _peft_name(name: str) -> tuple[str, str, str]:
    """Part, diffusers' module name and kind of a tensor, under any name of peft's or diffusers'."""
    part, _, rest = name.partition(".")
    ending = next((ending for ending in _ENDINGS if rest.endswith(ending)), None)
    if part not in LORA_PARTS or ending is None:
        raise InterchangeError(f"{name} is no weight of a LoRA of SDXL in peft's, diffusers' or kohya's format")
    module = rest.removesuffix(ending).replace(".processor.", ".")
    if part != "unet":
        module = module.removeprefix("text_model.")
    start, dot, last = module.rpartition(".")
    return part, f"{start}{dot}{_PROCESSORS['unet' if part == 'unet' else 'text'].get(last, last)}", _ENDINGS[ending]


def _check_pair(module: str, tensors: dict) -> None:
    if missing := [kind for kind in ("down", "up") if kind not in tensors]:
        raise InterchangeError(f"{module} has no {missing[0]} weight; the file is incomplete")


def _check_plain(part: str, config: dict) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise InterchangeError(f"the {part}'s adapter is {config['peft_type']}, not a LoRA")
    for name, plain in _PLAIN.items():
        if config.get(name, plain) not in (plain, None):
            raise InterchangeError(f"the {part}'s LoRA has {name} = {config[name]}, for which kohya's format has no name")


def _peft_alpha(part: str, module: str, rank: int, config: dict) -> float:
    """Such that alpha / rank is peft's factor, which with rsLoRA is α/√rank. Without a configuration it is 1."""
    if not config:
        return float(rank)

    def value_of(pattern: str, default: str) -> float:
        values = config.get(pattern) or {}
        # peft's own rule, on the name that the module has in the model.
        for name in (module,) if part == "unet" else (f"text_model.{module}", module):
            if (key := get_pattern_key(list(values), name)) in values:
                return values[key]
        return config.get(default, 8)  # peft's own default, of both

    if (configured := value_of("rank_pattern", "r")) != rank:
        raise InterchangeError(f"{part}.{module} is of rank {rank}, but of rank {configured} by its configuration")
    alpha = float(value_of("alpha_pattern", "lora_alpha"))
    return alpha * rank**0.5 if config.get("use_rslora") else alpha


def _from_kohya(state: dict[str, torch.Tensor], config: Mapping | None) -> dict[str, dict[str, Weights]]:
    names: dict[str, str] = {}
    for layout in LAYOUTS:
        names |= {kohya: module for module, kohya in unet_names(layout, config).items()}
    modules: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    source: dict[tuple[str, str], str] = {}
    for name, tensor in state.items():
        kohya, _, kind = name.partition(".")
        if kind not in _TENSORS:
            raise InterchangeError(f"{name} is no weight of a LoRA, LoCon or DoRA; other kinds can't be converted")
        place = _place(kohya, names)
        if place is None:
            raise InterchangeError(f"{kohya} is no module of {_model(config)}")
        if source.setdefault(place, kohya) != kohya:
            raise InterchangeError(f"{kohya} and {source[place]} are the same module; the file mixes two layouts")
        modules.setdefault(place, {})[_TENSORS[kind]] = tensor
    parts: dict[str, dict[str, Weights]] = {}
    for place, tensors in modules.items():
        _check_pair(source[place], tensors)
        down, up = tensors["down"], tensors["up"]
        # Without an alpha the factor is 1, as in kohya's scripts.
        alpha = float(tensors.get("alpha", len(down)))
        magnitude = _dora_scale(source[place], tensors["magnitude"], len(up)) if "magnitude" in tensors else None
        parts.setdefault(place[0], {})[place[1]] = Weights(down, up, alpha, magnitude)
    return _in_order(parts)


def _in_order(parts: dict[str, dict[str, Weights]]) -> dict[str, dict[str, Weights]]:
    return {part: parts[part] for part in LORA_PARTS if part in parts}


def _place(kohya: str, unet: dict[str, str]) -> tuple[str, str] | None:
    """Part and diffusers' module name."""
    if kohya in unet:
        return "unet", unet[kohya]
    for part in ("text_encoder", "text_encoder_2"):
        for prefix in KOHYA_PREFIXES[part]:
            if kohya.startswith(prefix) and (match := _KOHYA_TEXT_MODULE.fullmatch(kohya.removeprefix(prefix))):
                module = f"encoder.layers.{match[1]}.{match[2]}.{match[3]}"
                return (part, module) if _TEXT_MODULE.fullmatch(module) else None
    return None


def _dora_scale(module: str, scale: torch.Tensor, outputs: int) -> torch.Tensor:
    """(out, 1[, 1, 1]) → (out,)."""
    if len(scale) != outputs or scale.numel() != outputs:
        raise InterchangeError(
            f"{module} has DoRA magnitudes of shape {tuple(scale.shape)}, which are those of its inputs; peft has those of "
            "outputs only"
        )
    return scale.reshape(-1)


def _check(part: str, module: str, weights: Weights, config: Mapping | None) -> None:
    """The module exists, the shapes fit it, and the numbers are finite."""
    name = f"{part}.{module}"
    if not torch.isfinite(torch.tensor(weights.alpha)):
        raise InterchangeError(f"{name} has alpha = {weights.alpha}")
    down, up = tuple(weights.down.shape), tuple(weights.up.shape)
    if part != "unet":
        if _TEXT_MODULE.fullmatch(module) is None:
            raise InterchangeError(f"{name} has no name in kohya's format, which covers attention and MLP of text encoders")
        fits = len(down) == len(up) == 2 and down[0] == up[1]
    else:
        shape = unet_shapes(config).get(f"{module}.weight", ())
        if len(shape) < 2:
            raise InterchangeError(f"{name} is no module of {_model(config)}")
        fits = down == (weights.rank, *shape[1:]) and up == (shape[0], weights.rank, *(1 for _ in shape[2:]))
    if not fits or not weights.rank:
        raise InterchangeError(f"{name} has weights of shapes {down} and {up}, which don't fit {_model(config)}")
    if weights.magnitude is not None and len(weights.magnitude) != up[0]:
        raise InterchangeError(f"{name} has {len(weights.magnitude)} DoRA magnitudes for {up[0]} outputs")


def _check_dora(parts: dict[str, dict[str, Weights]]) -> None:
    if not parts:
        raise InterchangeError("it holds no weights")
    for part, modules in parts.items():
        if len({weights.magnitude is None for weights in modules.values()}) > 1:
            raise InterchangeError(f"some of the {part}'s modules have DoRA magnitudes and some don't; peft has all or none")


def _model(config: Mapping | None) -> str:
    return "SDXL (of another size? then give --pretrained_model_name_or_path)" if config is None else "the base model's UNet"


def from_kohya(file: str | Path, config: Mapping | None = None) -> Adapter:
    """A LoRA in kohya's format, either layout, as an adapter with peft's names and configuration.

    Weights are kept bit for bit and each module's alpha exactly.
    See :meth:`Adapter.peft_state`, :func:`sdxl_ambient.formats.attach.attach`.

    Args:
        file: a .safetensors file or a folder with one.
        config: the configuration of the UNet that it is for; by default SDXL's own.

    Raises:
        InterchangeError: not such a LoRA, or one that can't be converted whole.
    """
    path = lora_file(file)
    if not any(name.startswith("lora_") for name in _names(path)):
        raise InterchangeError(f"{path} is not in kohya's format: no tensor in it is named lora_unet_… or lora_te…")
    return read_adapter(path, config)


def _names(path: Path) -> Iterable[str]:
    try:
        with safe_open(str(path), "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise InterchangeError(f"{path} can't be read: {one_line(error)}") from None
