"""Files of a LoRA in any layout → :class:`sdxl_ambient.formats.adapter.Adapter`."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from sdxl_ambient.errors import CheckpointError, InterchangeError, one_line
from sdxl_ambient.formats.adapter import Adapter, Weights
from sdxl_ambient.formats.files import read_tensors
from sdxl_ambient.formats.find import lora_file
from sdxl_ambient.formats.names import KOHYA_PREFIXES, LAYOUTS, LORA_PARTS, unet_names, unet_shapes
from sdxl_ambient.formats.record import DAMAGED_FILE, lora_metadata, public_info, read_training_info

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
# Of the two text encoders one has 12 layers, the other 32.
_TEXT_MODULE = re.compile(r"encoder\.layers\.\d{1,2}\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
_PATTERN = re.compile(r"(\^?)((?:[A-Za-z0-9_.]|\\\.)+)\$?")
_KOHYA_TEXT_MODULE = re.compile(r"text_model_encoder_layers_(\d{1,2})_(self_attn|mlp)_((?:q|k|v|out)_proj|fc[12])")
_LARGEST = torch.finfo(torch.float32).max  # in which a LoRA is scaled
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
    state = read_tensors(file, besides=".alpha")  # of which the message says the value
    try:
        metadata, info = lora_metadata(file), public_info(read_training_info(file))
    except CheckpointError as error:
        raise InterchangeError(str(error)) from None
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
    strengths = {part: _Strengths(part, metadata) for part in dict.fromkeys(part for part, _ in modules)}
    parts: dict[str, dict[str, Weights]] = {}
    for (part, module), tensors in modules.items():
        _check_pair(f"{part}.{module}", tensors)
        magnitude = tensors["magnitude"].reshape(-1) if "magnitude" in tensors else None
        alpha = strengths[part].alpha(module, len(tensors["down"]))
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


def _check_pair(module: str, tensors: dict[str, torch.Tensor]) -> None:
    """Both factors are there, and every tensor has numbers and sides."""
    if missing := [kind for kind in ("down", "up") if kind not in tensors]:
        raise InterchangeError(f"{module} has no {missing[0]} weight; the file is incomplete")
    for kind, tensor in tensors.items():
        if not tensor.numel() or (kind == "alpha" and tensor.numel() > 1) or (kind != "alpha" and not tensor.ndim):
            wanted = "a single number is needed" if kind == "alpha" else "that is no matrix"
            raise InterchangeError(f"{module} has a {kind} of shape {tuple(tensor.shape)}; {wanted}")
        if tensor.is_complex() or (kind != "alpha" and not tensor.is_floating_point()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise InterchangeError(f"{module} has a {kind} of {dtype}, which is no weight's")


def _check_plain(part: str, config: dict) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise InterchangeError(f"the {part}'s adapter is {config['peft_type']}, not a LoRA")
    for name, plain in _PLAIN.items():
        if config.get(name, plain) not in (plain, None):
            raise InterchangeError(
                f"the {part}'s LoRA has {name} = {reprlib.repr(config[name])}, for which kohya's format has no name"
            )


class _Strengths:
    """What peft's configuration of one part says of each module's rank and alpha.

    Raises:
        InterchangeError: an adapter that does more than up·down, or values that are no numbers.
    """

    def __init__(self, part: str, metadata: dict):
        self.part = part
        self.config = {k.removeprefix(f"{part}."): v for k, v in metadata.items() if k.startswith(f"{part}.")}
        _check_plain(part, self.config)
        self.patterns = {name: self._literal(name) for name in ("rank_pattern", "alpha_pattern")}

    def alpha(self, module: str, rank: int) -> float:
        """Such that alpha / rank is peft's factor, which with rsLoRA is α/√rank. Without a configuration it is 1."""
        if not self.config:
            return float(rank)
        name = f"{self.part}.{module}"
        configured = _number(f"the rank of {name}", self._value_of("rank_pattern", "r", module))
        if configured != rank:
            raise InterchangeError(f"{name} is of rank {rank}, but of rank {configured:g} by its configuration")
        alpha = _number(f"the alpha of {name}", self._value_of("alpha_pattern", "lora_alpha", module))
        return alpha * rank**0.5 if self.config.get("use_rslora") else alpha

    def _value_of(self, pattern: str, default: str, module: str) -> object:
        """By the first pattern that fits the module, as in peft, else the value for all."""
        values = self.patterns[pattern]
        # On the name that the module has in the model.
        for name in (module,) if self.part == "unet" else (f"text_model.{module}", module):
            parts = name.split(".")
            fitting = [f"^{name}", *(".".join(parts[i:]) for i in range(len(parts)))]
            if found := [values[one] for one in fitting if one in values]:
                return min(found, key=lambda placed: placed[0])[1]
        return self.config.get(default, 8)  # peft's own default, of both

    def _literal(self, pattern: str) -> dict[str, tuple[int, object]]:
        """Name, or end of one, → its pattern's place in the list and value.

        peft takes patterns for regular expressions, which can be made to run for ever. In files there are names, their ends
        after a dot, and diffusers' whole names after ^; no others are read.
        """
        values = self.config.get(pattern) or {}
        if not isinstance(values, dict):
            raise InterchangeError(f"the {self.part}'s {pattern} is {reprlib.repr(values)}, not a value for each name")
        literal: dict[str, tuple[int, object]] = {}
        for place, (key, value) in enumerate(values.items()):
            if (match := _PATTERN.fullmatch(key)) is None:
                raise InterchangeError(
                    f"the {self.part}'s {pattern} has {reprlib.repr(key)}; only names of modules and their endings are "
                    "read, no expressions"
                )
            literal.setdefault(match[1] + match[2].replace("\\.", "."), (place, value))
        return literal


def _number(subject: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InterchangeError(f"{subject} is {reprlib.repr(value)} by its configuration, not a number")
    try:
        return float(value)
    except OverflowError:
        raise InterchangeError(f"{subject} is too large a number in its configuration") from None


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
    if not math.isfinite(weights.alpha) or abs(weights.alpha) > _LARGEST:
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


def _names(path: Path) -> list[str]:
    """The names of the tensors in a .safetensors file. Raises InterchangeError for one that can't be read."""
    try:
        with safe_open(str(path), "pt") as file:
            return list(file.keys())
    except DAMAGED_FILE as error:
        raise InterchangeError(f"{path} can't be read: {one_line(error)}") from None
