"""A whole SDXL model in one .safetensors file, as the original release, kohya's scripts, ComfyUI and Forge have it.

Such a file has weights alone. Its configurations are those of the architecture that it has the shapes of, which come with
this package, and so do both tokenizers; nothing is fetched. What it predicts, and on which noise, empty tensors say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import safe_open

from sdxl_ambient.errors import ModelError, one_line
from sdxl_ambient.models.finite import check_finite
from sdxl_ambient.models.libraries import LOADING_ERRORS

ARCHITECTURES = Path(__file__).with_name("architectures")
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT_ENCODERS = {"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1."}
# By the width of the first block and of what attention reads of a caption; and how many weights the UNet has.
_KNOWN = {(320, 2048): ("sdxl", 1680), (32, 80): ("miniature", 330)}
_COND_PROJ = f"{UNET}time_embed.cond_proj.weight"  # which an LCM's UNet has besides
_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth")  # of files; a folder or a name on the Hub has none of them
_TOKENIZERS = ("tokenizer", "tokenizer_2")
# What else a file may be, by the beginning of a name in it. The first that is there counts.
_OTHERS = {
    "lora_": "a LoRA, not a whole model; give it as --lora, and its base here",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3, not SDXL",
    "model.diffusion_model.double_blocks.": "Flux, not SDXL",
    "double_blocks.": "Flux, not SDXL",
    "cond_stage_model.": "Stable Diffusion 1 or 2, not SDXL",
}


@dataclass(frozen=True)
class SingleFile:
    """What one file says of itself, of which no weight has been read.

    Attributes:
        shapes: of its tensors, by name.
        folder: the configurations of its architecture.
        overrides: what its own are otherwise, by the subfolder of a pipeline; "" is ``model_index.json``.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    folder: Path
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def has(self, prefix: str) -> bool:
        """Whether some tensor's name begins so."""
        return any(name.startswith(prefix) for name in self.shapes)


def is_single_file(name_or_path: str | Path) -> bool:
    """Whether a model is given as a file, not as a folder or by its name on the Hub."""
    return Path(name_or_path).is_file()


def source_of(name_or_path: str | Path, subfolder: str | None = None) -> tuple[str, dict[str, Any]]:
    """Where the libraries read a part's configuration, and what is otherwise than it says there.

    A pipeline's folder, or a name on the Hub, is returned as it is.

    Raises:
        ModelError: a file that isn't a whole SDXL model.
    """
    if not is_single_file(name_or_path):
        if Path(name_or_path).suffix in _ENDINGS or Path(name_or_path).is_symlink() and not Path(name_or_path).exists():
            raise ModelError(f"the file {str(name_or_path)!r} can't be read: it does not exist")
        return str(name_or_path), {}
    file = single_file(name_or_path)
    folder = ARCHITECTURES if subfolder in _TOKENIZERS else file.folder
    return str(folder), dict(file.overrides.get(subfolder or "", {}))


def single_file(path: str | Path) -> SingleFile:
    """What a file of weights says of itself; only its header is read.

    Raises:
        ModelError: not a safetensors file, or not a whole SDXL model, with what it is where that can be told.
    """
    path = Path(path).absolute()
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelError(f"the file {str(path)!r} can't be read: {error.strerror}") from None
    return _single_file(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _single_file(path: Path, size: int, changed: int) -> SingleFile:
    """``size`` and ``changed`` tell files of one name apart."""
    shapes, metadata = _header(path)
    if (other := next((what for start, what in _OTHERS.items() if _begins(shapes, start)), None)) is not None:
        raise ModelError(f"the file {str(path)!r} holds {other}")
    if not _begins(shapes, UNET) or not any(_begins(shapes, start) for start in TEXT_ENCODERS.values()):
        raise ModelError(f"the file {str(path)!r} holds no whole SDXL model{_parts_hint(shapes)}")
    refiner = _begins(shapes, f"{TEXT_ENCODERS['text_encoder']}model.")  # its only one is the base's second one
    folder = ARCHITECTURES / "sdxl" if refiner else _architecture(path, shapes)
    return SingleFile(path, shapes, folder, _overrides(shapes, metadata, refiner))


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    try:
        with safe_open(str(path), "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, dict(file.metadata() or {})
    except LOADING_ERRORS as error:
        why = "only .safetensors files are read, since others can run code" if path.suffix != ".safetensors" else None
        raise ModelError(f"the file {str(path)!r} can't be read: {why or one_line(error)}") from None


def _begins(names: Mapping[str, Any], start: str) -> bool:
    return any(name.startswith(start) for name in names)


def _parts_hint(names: Mapping[str, Any]) -> str:
    """What a file that is no whole model may be given as."""
    if any("lora" in name for name in names):
        return ": it looks like a LoRA; give it as --lora, and its base here"
    if any(_begins(names, start) for start in (UNET, "diffusion_model.", "input_blocks.", "down_blocks.", "unet.")):
        return ": it looks like a UNet alone; give a whole model here, and a fine-tuned UNet as --unet"
    if any(_begins(names, start) for start in (VAE, "decoder.", "encoder.")):
        return ": it looks like a VAE; give it as --pretrained_vae_model_name_or_path, and a whole model here"
    return ""


def _architecture(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """The folder of the configurations whose network has these shapes. Raises ModelError for another."""
    first = shapes.get(f"{UNET}input_blocks.0.0.weight", (0,))
    caption = next((s for n, s in shapes.items() if n.startswith(UNET) and n.endswith(".attn2.to_k.weight")), (0,))
    name, wanted = _KNOWN.get((first[0], caption[-1]), (None, 0))
    count = sum(n.startswith(UNET) and n != _COND_PROJ for n in shapes)
    if name is None or count != wanted:
        raise ModelError(
            f"the UNet of the file {str(path)!r} is incomplete or not SDXL's own: it has {count} weights, where SDXL's has "
            f"{_KNOWN[320, 2048][1]}; of another architecture give a pipeline's folder, which has its configuration"
        )
    return ARCHITECTURES / name


def _overrides(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], refiner: bool
) -> dict[str, dict[str, Any]]:
    """What a file's shapes and marks say that SDXL's configurations don't, in their words, to be judged as others are."""
    unet: dict[str, Any] = {}
    first = shapes.get(f"{UNET}input_blocks.0.0.weight", ())
    if len(first) == 4 and first[1] != 4:
        unet["in_channels"] = first[1]
    if _COND_PROJ in shapes:
        unet["time_cond_proj_dim"] = shapes[_COND_PROJ][-1]
    scheduler: dict[str, Any] = {}
    # The first is ComfyUI's and kohya's mark, the second ModelSpec's.
    if "v_pred" in shapes or metadata.get("modelspec.prediction_type") in ("v", "v_prediction"):
        scheduler["prediction_type"] = "v_prediction"
    if "ztsnr" in shapes:
        scheduler["rescale_betas_zero_snr"] = True
    if any(name.startswith("edm") for name in shapes):
        scheduler["_class_name"] = "EDMEulerScheduler"
    index = {"text_encoder": [None, None], "requires_aesthetics_score": True} if refiner else {}
    return {"unet": unet, "scheduler": scheduler, "": index}


# -- weights ------------------------------------------------------------------


def tensors(path: str | Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a file whose names begin so, under these names. Raises one of ``LOADING_ERRORS``."""
    with safe_open(str(path), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}


def stored_dtype(path: str | Path, prefix: str) -> torch.dtype:
    """The precision of the first tensor of a file whose name begins so; float32 where there is none."""
    with safe_open(str(path), "pt") as file:
        first = next((name for name in sorted(file.keys()) if name.startswith(prefix)), None)
        return torch.float32 if first is None else file.get_tensor(first).dtype


def clip_from_file(kind: type, path: str | Path, part: str, what: str, dtype: torch.dtype) -> torch.nn.Module:
    """A text encoder of a whole model's file, every weight from the file and finite.

    Args:
        kind: the class of transformers. part: ``text_encoder`` or ``text_encoder_2``. what: its name in a message.

    Raises:
        ModelError: one that is missing, incomplete or damaged.
    """
    source = f"the {what} of {str(path)!r}"
    file = single_file(path)
    try:
        weights = tensors(path, TEXT_ENCODERS[part])
        weights = {name: tensor for name, tensor in weights.items() if not name.endswith("position_ids")}
        if not weights:
            raise ValueError("the file holds none")
        check_floating(weights)
        network = create_diffusers_clip_model_from_ldm(
            kind, weights, subfolder=part, config=str(file.folder), torch_dtype=dtype, local_files_only=True
        )
    except LOADING_ERRORS as error:
        raise ModelError(f"{source} can't be loaded: {one_line(error)}") from None
    check_complete(network, source)
    return network


def check_floating(weights: Mapping[str, torch.Tensor]) -> None:
    """Weights are real numbers with a fraction; a ValueError names one that isn't."""
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is of {str(tensor.dtype).removeprefix('torch.')}, which is no weight's")


def network_of(
    kind: Any,
    weights: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    convert: Callable[..., dict[str, torch.Tensor]] | None,
    dtype: torch.dtype,
) -> Any:
    """A network of diffusers with just these weights, for evaluation.

    Its own ``from_single_file`` drops what it doesn't know, and ends in the middle of its work where a weight is missing.

    Args:
        config: its configuration. convert: from the original release's names; None for weights under diffusers' own.

    Raises:
        ValueError, or another of ``LOADING_ERRORS``: too few weights, too many, or of other shapes; the first is named.
    """
    check_floating(weights)
    with torch.device("meta"):
        network = kind.from_config(dict(config))
    named = dict(weights)
    if convert is not None:
        try:
            named = convert(dict(weights), config=dict(config))
        except KeyError as error:
            raise ValueError(f"it holds {len(weights)} weights, and {error.args[0]} is missing") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    have = {name: tuple(tensor.shape) for name, tensor in named.items()}
    if other := sorted(name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name)):
        name = other[0]
        problem = "missing" if name not in have else "unknown" if name not in wanted else "of another shape"
        raise ValueError(f"{len(other)} weights differ, {name} is {problem}")
    if len(weights) != len(wanted):
        raise ValueError(f"it holds {len(weights)} weights instead of {len(wanted)}")
    network.load_state_dict({name: tensor.to(dtype) for name, tensor in named.items()}, assign=True)
    return network.eval()


def check_complete(network: torch.nn.Module, source: str) -> None:
    """Every weight was there, and is finite; diffusers leaves those empty that weren't. Raises ModelError."""
    missing = sorted(name for name, tensor in network.state_dict().items() if tensor.is_meta)
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise ModelError(f"{source} can't be used: {missing[0]}{more} missing")
    check_finite(network.state_dict(), source)
