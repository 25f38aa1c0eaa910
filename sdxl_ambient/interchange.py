"""LoRAs as other programs read and write them: kohya's format, to and from peft's.

Names in the three worlds, by the example of one linear layer of SDXL's UNet:

    diffusers, peft     down_blocks.1.attentions.0.proj_in         .lora_A.weight      .lora_B.weight
    the original (sgm)  input_blocks.4.1.proj_in
    kohya, ComfyUI      lora_unet_input_blocks_4_1_proj_in         .lora_down.weight   .lora_up.weight   .alpha
    kohya, diffusers    lora_unet_down_blocks_1_attentions_0_proj_in  (the same; UIs and diffusers read both)

Every name is looked up in the list of the modules that the architecture really has, so that none is guessed and a LoRA of
another model is refused. A LoRA is W + (alpha / rank)·up·down, and with DoRA's magnitude m that is scaled to length m per
output.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.utils import set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from sdxl_ambient.checkpoint import (
    ARCHITECTURE,
    LORA_FILE,
    CheckpointError,
    in_file,
    lora_metadata,
    lora_state,
    model_metadata,
    public_info,
    read_training_info,
)
from sdxl_ambient.lora import trainable_to_float32
from sdxl_ambient.manifest import hash_file
from sdxl_ambient.models import one_line

LAYOUTS = ("sgm", "diffusers")
GENERATIVE_MODELS = "https://github.com/Stability-AI/generative-models"  # ModelSpec's name for whose names these are
SDXL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# The parts that a LoRA changes, with kohya's names for them; lora_te_ is the first text encoder's in SD 1.5's scripts.
_PREFIXES = {"unet": ("lora_unet_",), "text_encoder": ("lora_te1_", "lora_te_"), "text_encoder_2": ("lora_te2_",)}
_TENSORS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha", "dora_scale": "magnitude"}
# peft's names, and those that diffusers' own training scripts write.
_PEFT = re.compile(
    r"(?P<part>unet|text_encoder|text_encoder_2)\.(?P<module>.+?)\."
    r"(?:(?P<down>lora_A|lora\.down|lora_linear_layer\.down)\.weight"
    r"|(?P<up>lora_B|lora\.up|lora_linear_layer\.up)\.weight"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)
_TEXT_MODULE = re.compile(r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
_KOHYA_TEXT_MODULE = re.compile(r"text_model_encoder_layers_(\d+)_(self_attn|mlp)_((?:q|k|v|out)_proj|fc[12])")
# What of peft's configuration says that a module does more than up·down, and the value with which it doesn't.
_PLAIN = {"lora_bias": False, "fan_in_fan_out": False, "modules_to_save": None, "layer_replication": None}
_PLAIN |= {"trainable_token_indices": None, "target_parameters": None, "use_qalora": False, "use_bdlora": None}


class InterchangeError(ValueError):
    """A file that can't be converted whole. The message is one line."""


@dataclass
class Weights:
    """One module's LoRA: ``down`` (rank, in[, k, k]), ``up`` (out, rank[, 1, 1]), applied times ``alpha / rank``;
    ``magnitude`` (out,), with DoRA. Any dtype."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)


@dataclass
class Adapter:
    """A LoRA, out of whatever file: the weights of each part's modules, by diffusers' names (text encoders' start with
    ``encoder.``), and what training recorded."""

    parts: dict[str, dict[str, Weights]]
    info: dict = field(default_factory=dict)

    @property
    def uses_dora(self) -> bool:
        return any(w.magnitude is not None for modules in self.parts.values() for w in modules.values())

    def peft_state(self) -> dict[str, torch.Tensor]:
        """Under the names that :func:`sdxl_ambient.checkpoint.save_lora` writes, ``unet.….lora_A.weight``."""
        state = {}
        for part, modules in self.parts.items():
            # Text encoders without text_model take such names too, those with it no others.
            start = f"{part}." if part == "unet" else f"{part}.text_model."
            for name, weights in modules.items():
                state[f"{start}{name}.lora_A.weight"] = weights.down
                state[f"{start}{name}.lora_B.weight"] = weights.up
                if weights.magnitude is not None:
                    # peft keeps a convolution's as (1, out, 1, 1).
                    shape = (1, -1, *weights.up.shape[2:]) if weights.up.ndim > 2 else (-1,)
                    # The end that transformers reads.
                    end = "" if part == "unet" else ".weight"
                    state[f"{start}{name}.lora_magnitude_vector{end}"] = weights.magnitude.reshape(shape)
        return state

    def peft_config(self, part: str) -> dict:
        """Arguments of peft's ``LoraConfig``, in which every module has its own rank and alpha."""
        modules = self.parts[part]
        rank, rank_pattern = _pattern({name: weights.rank for name, weights in modules.items()})
        alpha, alpha_pattern = _pattern({name: weights.alpha for name, weights in modules.items()})
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "target_modules": sorted(modules),
            "use_dora": any(weights.magnitude is not None for weights in modules.values()),
            "use_rslora": False,
        }

    def peft_metadata(self) -> dict:
        """All parts' configurations, as diffusers stores them in a LoRA's file."""
        return {f"{part}.{k}": v for part in self.parts for k, v in self.peft_config(part).items()}


def _pattern(values: dict[str, float]) -> tuple[float, dict[str, float]]:
    """The most common value, and the modules with another: by their ending where all with that ending agree.

    peft takes patterns for regular expressions and tries one after the other, so that few of them load faster.
    """
    common = Counter(values.values()).most_common(1)[0][0]
    endings: dict[str, set] = {}
    for name, value in values.items():
        endings.setdefault(_ending(name), set()).add(value)
    pattern = {}
    for name, value in values.items():
        if value != common:
            pattern[_ending(name) if len(endings[_ending(name)]) == 1 else name] = value
    return common, pattern


def _ending(name: str) -> str:
    """``conv1``, ``to_out.0``: the last part of a name, two if the last is a number."""
    return re.search(r"[^.]+(\.\d+)*$", name)[0]


# -- names of the UNet ----------------------------------------------------------------------

_SGM = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_SGM_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def sgm_name(module: str, config: Mapping) -> str:
    """The original release's name for a module of diffusers' SDXL UNet (``config`` is the UNet's).

    The original numbers all layers of the way down through, and all of the way up; a layer is a resnet (0), its attention
    (1) and, at the end of a level, the sampler.
    """
    if module in _SGM_OUTSIDE:
        return _SGM_OUTSIDE[module]
    place, *rest = module.split(".")
    if place == "mid_block":
        kind, index, *inner = rest
        # resnet, attention, resnet
        return _joined("middle_block", 1 if kind == "attentions" else 2 * int(index), kind, inner)
    block, kind, index, *inner = rest
    layers, block, index = config["layers_per_block"], int(block), int(index)
    if place == "down_blocks":
        # conv_in is number 0.
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op"
        return _joined(f"input_blocks.{block * (layers + 1) + index + 1}", int(kind == "attentions"), kind, inner)
    number = block * (layers + 1) + (layers if kind == "upsamplers" else index)
    if kind == "upsamplers":
        after_attention = "CrossAttn" in config["up_block_types"][block]
        return f"output_blocks.{number}.{1 + after_attention}.conv"
    return _joined(f"output_blocks.{number}", int(kind == "attentions"), kind, inner)


def _joined(block: str, number: int, kind: str, inner: list[str]) -> str:
    first = _SGM.get(inner[0], inner[0]) if kind == "resnets" else inner[0]
    return ".".join([block, str(number), first, *inner[1:]])


def unet_shapes(config: Mapping | None = None) -> dict[str, tuple[int, ...]]:
    """Name → shape of every weight and bias of an SDXL UNet, without making it. By default SDXL's own.

    Raises:
        InterchangeError: a configuration of another architecture.
    """
    return _shapes(json.dumps(dict(SDXL_UNET if config is None else config), sort_keys=True, default=str))


@functools.lru_cache(maxsize=4)
def _shapes(config: str) -> dict[str, tuple[int, ...]]:
    values = {k: v for k, v in json.loads(config).items() if not k.startswith("_")}
    if values.get("addition_embed_type") != "text_time" or not isinstance(values.get("layers_per_block", 2), int):
        raise InterchangeError("the base model's UNet is not SDXL's, whose names alone are known")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**values)
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}


def unet_names(layout: str, config: Mapping | None = None) -> dict[str, str]:
    """diffusers' name → kohya's, of all linear and convolutional modules of an SDXL UNet."""
    full = {"layers_per_block": 2, **(SDXL_UNET if config is None else config)}
    modules = [n.removesuffix(".weight") for n, shape in unet_shapes(config).items() if n.endswith(".weight") and shape[1:]]
    named = {n: "lora_unet_" + (sgm_name(n, full) if layout == "sgm" else n).replace(".", "_") for n in modules}
    assert len(set(named.values())) == len(named)
    return named


def _kohya_text_name(part: str, module: str) -> str:
    return _PREFIXES[part][0] + f"text_model.{module}".replace(".", "_")


# -- reading ----------------------------------------------------------------------


def read_adapter(lora: str | Path, config: Mapping | None = None) -> Adapter:
    """A LoRA in peft's, diffusers' or kohya's format (either layout), from a .safetensors file or a folder with one.

    Args:
        config: the configuration of the UNet that it is for; by default SDXL's own.

    Raises:
        InterchangeError: unreadable, another kind of adapter or for another architecture, incomplete, or of unknown
            strength.
    """
    file = lora_file(Path(lora))
    try:
        state, metadata, info = load_file(str(file)), lora_metadata(file), public_info(read_training_info(file))
    except CheckpointError as error:
        raise InterchangeError(str(error)) from None
    except (OSError, SafetensorError) as error:
        raise InterchangeError(f"{file} can't be read: {' '.join(str(error).split())}") from None
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


def lora_file(path: Path) -> Path:
    """The file itself, or the one that a folder holds. Raises InterchangeError."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InterchangeError(f"{path} is not a .safetensors file; no other is read")
        return path
    if (path / LORA_FILE).is_file():
        return path / LORA_FILE
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise InterchangeError(f"{path} holds {len(found)} LoRA files; give one file" if path.is_dir() else f"no {path}")
    return found[0]


def _from_peft(state: dict[str, torch.Tensor], metadata: dict) -> dict[str, dict[str, Weights]]:
    found: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        match = _PEFT.fullmatch(name)
        if match is None:
            raise InterchangeError(f"{name} is no weight of a LoRA of SDXL in peft's or kohya's format")
        (kind,) = [k for k in ("down", "up", "magnitude") if match[k]]
        module = match["module"] if match["part"] == "unet" else match["module"].removeprefix("text_model.")
        found.setdefault((match["part"], module), {})[kind] = tensor
    parts: dict[str, dict[str, Weights]] = {}
    for (part, module), tensors in found.items():
        _check_pair(f"{part}.{module}", tensors)
        config = {k.removeprefix(f"{part}."): v for k, v in metadata.items() if k.startswith(f"{part}.")}
        _check_plain(part, config)
        magnitude = tensors["magnitude"].reshape(-1) if "magnitude" in tensors else None
        alpha = _peft_alpha(part, module, len(tensors["down"]), config)
        parts.setdefault(part, {})[module] = Weights(tensors["down"], tensors["up"], alpha, magnitude)
    return parts


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

    def of(pattern: str, default: str):
        values = config.get(pattern) or {}
        # peft's own rule, on the name that the module has in the model.
        for name in (module,) if part == "unet" else (f"text_model.{module}", module):
            if (key := get_pattern_key(values, name)) in values:
                return values[key]
        return config.get(default, 8)  # peft's own default, of both

    if (said := of("rank_pattern", "r")) != rank:
        raise InterchangeError(f"{part}.{module} is of rank {rank}, but of rank {said} by its configuration")
    alpha = float(of("alpha_pattern", "lora_alpha"))
    return alpha * rank**0.5 if config.get("use_rslora") else alpha


def _from_kohya(state: dict[str, torch.Tensor], config: Mapping | None) -> dict[str, dict[str, Weights]]:
    names = {}
    for layout in LAYOUTS:
        names |= {kohya: module for module, kohya in unet_names(layout, config).items()}
    found: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
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
        found.setdefault(place, {})[_TENSORS[kind]] = tensor
    parts: dict[str, dict[str, Weights]] = {}
    for place, tensors in found.items():
        _check_pair(source[place], tensors)
        down, up = tensors["down"], tensors["up"]
        # Without an alpha the factor is 1, as in kohya's scripts.
        alpha = float(tensors.get("alpha", len(down)))
        magnitude = _dora_scale(source[place], tensors["magnitude"], len(up)) if "magnitude" in tensors else None
        parts.setdefault(place[0], {})[place[1]] = Weights(down, up, alpha, magnitude)
    return dict(sorted(parts.items(), key=lambda item: list(_PREFIXES).index(item[0])))


def _place(kohya: str, unet: dict[str, str]) -> tuple[str, str] | None:
    """Part and diffusers' module name."""
    if kohya in unet:
        return "unet", unet[kohya]
    for part in ("text_encoder", "text_encoder_2"):
        for prefix in _PREFIXES[part]:
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


# -- kohya's format ----------------------------------------------------------------------


def to_kohya(
    lora: str | Path | Adapter,
    layout: str = "sgm",
    *,
    config: Mapping | None = None,
    dtype: torch.dtype | None = None,
    title: str | None = None,
    date: str | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A LoRA → what kohya's scripts, ComfyUI, A1111 and their like read: tensors and metadata for a safetensors file.

    Names as in kohya-ss/sd-scripts, networks/lora.py: ``lora_unet_…`` with the original release's blocks (``sgm``) or
    diffusers' (``diffusers``), ``lora_te1_…``, ``lora_te2_…``; ``lora_down`` (rank, in[, k, k]), ``lora_up``
    (out, rank[, 1, 1]), ``alpha``, a number, and, for DoRA as LyCORIS has it, ``dora_scale`` (out, 1[, 1, 1]).

    Args:
        lora: a file, a folder or an adapter that was read already.
        config: the configuration of the UNet that it is for; by default SDXL's own.
        dtype: of the weights; by default as they are.
        date: ISO 8601; by default today's.

    Raises:
        InterchangeError: what the format can't hold, or values that ``dtype`` can't.
    """
    adapter = lora if isinstance(lora, Adapter) else read_adapter(lora, config)
    state: dict[str, torch.Tensor] = {}
    for part, modules in adapter.parts.items():
        named = unet_names(layout, config) if part == "unet" else {m: _kohya_text_name(part, m) for m in modules}
        for module, weights in modules.items():
            kohya = named[module]
            state[f"{kohya}.lora_down.weight"] = in_dtype(kohya, weights.down, dtype)
            state[f"{kohya}.lora_up.weight"] = in_dtype(kohya, weights.up, dtype)
            state[f"{kohya}.alpha"] = _exact(weights.alpha)
            if weights.magnitude is not None:
                shape = (-1, *(1 for _ in weights.down.shape[1:]))
                state[f"{kohya}.dora_scale"] = in_dtype(kohya, weights.magnitude.reshape(shape), dtype)
    return state, kohya_metadata(adapter, title, date)


def _exact(number: float) -> torch.Tensor:
    """float32 where that is exact: kohya's files have it so. rsLoRA's α√rank takes float64."""
    short = torch.tensor(number, dtype=torch.float32)
    return short if float(short) == number else torch.tensor(number, dtype=torch.float64)


def in_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """``tensor`` in ``dtype``, contiguous. Raises InterchangeError where a finite value becomes infinite."""
    if dtype is None or not tensor.is_floating_point():
        return tensor.contiguous()
    short = tensor.to(dtype)
    if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(short).all()):
        raise InterchangeError(f"{name} has values too large for {str(dtype).removeprefix('torch.')}; take bfloat16")
    return short.contiguous()


def kohya_metadata(adapter: Adapter, title: str | None = None, date: str | None = None) -> dict[str, str]:
    """ModelSpec's keys, ours, and those of kohya's that its scripts call the minimum, with the base model's name.

    The rank and alpha are those of most modules; each module's own stand in its tensors.
    """
    weights = [w for modules in adapter.parts.values() for w in modules.values()]
    rank, alpha = Counter((w.rank, w.alpha) for w in weights).most_common(1)[0][0]
    found = model_metadata(adapter.info, f"{ARCHITECTURE}/lora", GENERATIVE_MODELS, title)
    arguments: dict = {}
    if kernels := [(w.rank, w.alpha) for w in weights if w.down.ndim > 2 and max(w.down.shape[2:]) > 1]:
        conv_rank, conv_alpha = Counter(kernels).most_common(1)[0][0]
        arguments = {"conv_dim": str(conv_rank), "conv_alpha": str(conv_alpha)}
    if adapter.uses_dora:
        # The kind of network in LyCORIS that has magnitudes, of the outputs.
        arguments = {"algo": "locon", "dora_wd": "True", "wd_on_output": "True", **arguments}
    found |= {
        "modelspec.date": date or datetime.date.today().isoformat(),
        "ss_network_module": "lycoris.kohya" if adapter.uses_dora else "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps(arguments),
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_output_name": found["modelspec.title"],
    }
    if adapter.info.get("base_model"):
        found["ss_sd_model_name"] = str(adapter.info["base_model"])
    return found


def from_kohya(file: str | Path, config: Mapping | None = None) -> Adapter:
    """A LoRA in kohya's format, either layout, as an adapter with peft's names and configuration.

    Weights are kept bit for bit and each module's alpha exactly. See :meth:`Adapter.peft_state`, :func:`attach`.

    Raises:
        InterchangeError: not such a LoRA, or one that can't be converted whole.
    """
    path = lora_file(Path(file))
    if not any(name.startswith("lora_") for name in _names(path)):
        raise InterchangeError(f"{path} is not in kohya's format: no tensor in it is named lora_unet_… or lora_te…")
    return read_adapter(path, config)


def _names(path: Path) -> Iterable[str]:
    try:
        with safe_open(str(path), "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise InterchangeError(f"{path} can't be read: {' '.join(str(error).split())}") from None


def peft_file(adapter: Adapter, title: str | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of ``pytorch_lora_weights.safetensors``, for the stock ``load_lora_weights``."""
    described = json.dumps(adapter.peft_metadata(), indent=2, sort_keys=True)
    own = model_metadata(adapter.info, f"{ARCHITECTURE}/lora", "diffusers", title)
    state = {name: tensor.contiguous() for name, tensor in adapter.peft_state().items()}
    return state, {"format": "pt", **own, LORA_ADAPTER_METADATA_KEY: described}


def attach(
    unet: torch.nn.Module, adapter: Adapter, text_encoders: Sequence[torch.nn.Module] = (), *, dropout: float = 0.0
) -> None:
    """Freeze ``unet`` and put the adapter in, trainable and in float32, as :func:`sdxl_ambient.lora.add_lora` puts a new
    one: training then goes on from it, saves and resumes as from any other. Likewise both ``text_encoders``, where they are
    trained; one that the adapter says nothing of is left as it is.

    Raises:
        InterchangeError: an adapter without a UNet's weights, or with those of text encoders, which aren't trained, or one
            that doesn't fit.
    """
    models = dict(zip(_PREFIXES, (unet, *text_encoders), strict=False))
    if others := [part for part in adapter.parts if part not in models]:
        raise InterchangeError(
            f"the LoRA has weights of {' and '.join(others)}; they are trained on with --train_text_encoder"
        )
    if "unet" not in adapter.parts:
        raise InterchangeError("the LoRA has no weights of the UNet")
    state = adapter.peft_state()
    for part in adapter.parts:
        _attach(models[part], part, adapter, {n: tensor for n, tensor in state.items() if n.startswith(f"{part}.")}, dropout)
    if "text_encoder" in adapter.parts:
        # SDXL reads the layer before the first encoder's last one, which never gets a gradient.
        last = f"layers.{text_encoders[0].config.num_hidden_layers - 1}."
        for name, parameter in text_encoders[0].named_parameters():
            if last in name:
                parameter.requires_grad_(False)


def _attach(model, part: str, adapter: Adapter, state: dict[str, torch.Tensor], dropout: float) -> None:
    model.requires_grad_(False)
    try:
        model.add_adapter(LoraConfig(**adapter.peft_config(part), lora_dropout=dropout), adapter_name="default")
    except ValueError as error:
        raise InterchangeError(f"the LoRA doesn't fit the {part}: {one_line(error)}") from None
    trainable_to_float32(model)  # before the weights, which a half base's dtype would round
    own = {f"{part}.{in_file(part, name)}": name for name in lora_state(model)}
    if odd := sorted(own.keys() ^ state.keys()):
        raise InterchangeError(f"the LoRA doesn't fit the {part}: {odd[0]}")
    try:
        set_peft_model_state_dict(model, {name: state[stored] for stored, name in own.items()}, adapter_name="default")
    except RuntimeError as error:
        raise InterchangeError(f"the LoRA doesn't fit the {part}: {one_line(error)}") from None


def start_from(
    unet: torch.nn.Module, lora: str | Path, text_encoders: Sequence[torch.nn.Module] = (), *, dropout: float = 0.0
) -> dict:
    """Put a LoRA into ``unet``, and into both ``text_encoders`` where they are trained, to train on from: a file or folder
    of ours, of diffusers or of kohya's scripts.

    Returns:
        what the run's record says of it, which a resume must agree in: {"lora": the file's SHA-256}.

    Raises:
        InterchangeError: as :func:`read_adapter` and :func:`attach`.
    """
    try:
        file = lora_file(Path(lora))
        attach(unet, read_adapter(file, dict(unet.config)), text_encoders, dropout=dropout)
    except InterchangeError as error:
        raise InterchangeError(f"--lora: {error}") from None
    return {"lora": hash_file(file)}
