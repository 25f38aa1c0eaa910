"""The models to evaluate: which weights a name stands for, whether they are there, and their hashes."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from eval.images import StageError
from sdxl_ambient.config import OptionError
from sdxl_ambient.manifest import hash_file, hash_json, read_json


@dataclass(frozen=True)
class Checkpoint:
    """A model to evaluate: the base (neither path given), the base with a LoRA, or with a fully fine-tuned UNet."""

    name: str
    lora: Path | None = None
    unet: Path | None = None

    def t_n(self) -> int | None:
        """The noise level it was trained at; None for clean, the base model, or unknown."""
        from sdxl_ambient.pipeline import adapter_t_n

        path = self.lora or self.unet
        return adapter_t_n(path) if path else None


def check_device(device: str) -> None:
    """Raises OptionError for a device that isn't there."""
    try:
        kind = torch.device(device).type if device != "auto" else "cpu"
    except RuntimeError:
        raise OptionError(f"--device: {device!r} is not a device; auto, cpu, cuda and cuda:N are") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"--device: {device!r} asked for, but this machine has no CUDA GPU that torch can use")


def check_model_path(name: str, value: str | None) -> None:
    """A path that looks local must be a pipeline's directory; anything else is taken for a Hub id. Raises
    OptionError.
    """
    if value is None:
        return
    local = Path(value).exists() or value.startswith(("/", ".", "~")) or value.count("/") != 1
    if local and not (Path(value) / "model_index.json").is_file():
        raise OptionError(f"--{name}: {value!r} has no model_index.json; give a diffusers pipeline's directory or a Hub id")


def check_checkpoint(option_name: str, path: Path) -> None:
    """The weights must be there. Raises OptionError."""
    if not path.exists():
        raise OptionError(f"--{option_name}: {str(path)!r} does not exist")
    if not weight_files(path, option_name):
        wanted = "pytorch_lora_weights.safetensors" if option_name == "lora" else "a UNet's .safetensors files"
        raise OptionError(f"--{option_name}: {str(path)!r} does not hold {wanted}")


def check_tuned(options) -> None:
    """``lora`` and ``unet`` of a stage that takes one model: not both, and with their weights. Raises OptionError."""
    if options.lora and options.unet:
        raise OptionError("--unet: can not be combined with --lora")
    for name in ("lora", "unet"):
        if getattr(options, name):
            check_checkpoint(name, Path(getattr(options, name)))


def tuned(options) -> Checkpoint:
    """The one model of such a stage, called like its output folder."""
    paths = (Path(p) if p else None for p in (options.lora, options.unet))
    return Checkpoint(Path(options.output_dir).name, *paths)


def resolve_device(device: str) -> str:
    """ "auto" → "cuda" where there is one, else "cpu"."""
    return device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def resolve_base(name_or_path: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The base model's local directory, downloaded from the Hub (or found in its cache) where it isn't one."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from diffusers import DiffusionPipeline

    try:
        folder = DiffusionPipeline.download(name_or_path, revision=revision, variant=variant, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise StageError(f"--pretrained_model_name_or_path: {name_or_path!r} can't be fetched: {reason}") from None
    return Path(folder)


def weight_files(path: Path, kind: str) -> list[Path]:
    """The files that decide what a checkpoint draws: of a LoRA, of a UNet (or a folder that holds ``unet/``), of a
    base.
    """
    if path.is_file():
        return [path] if path.suffix == ".safetensors" else []
    if kind == "lora":
        named = path / "pytorch_lora_weights.safetensors"
        return [named] if named.is_file() else sorted(path.glob("*.safetensors"))
    if kind == "unet":
        path = path / "unet" if (path / "unet").is_dir() else path
        weights = sorted(path.glob("*.safetensors"))
        return [path / "config.json", *weights] if weights and (path / "config.json").is_file() else []
    index = path / "model_index.json"
    components = [name for name in read_json(index) if (path / name).is_dir()] if index.is_file() else ["."]
    found = [p for name in components for p in (path / name).iterdir() if p.is_file() and not p.name.startswith(".")]
    return sorted([*found, index] if index.is_file() else found)


@functools.cache
def hash_weights(path: Path, kind: str) -> str:
    """SHA-256 over the names and contents of :func:`weight_files`."""
    root = path.parent if path.is_file() else path
    return hash_json({p.relative_to(root).as_posix(): hash_file(p) for p in weight_files(path, kind)})


def model_errors() -> tuple[type[Exception], ...]:
    """Errors of a model that can't be used. They exist once diffusers is loaded, which given images don't need."""
    names = [("sdxl_ambient.models", "ModelError"), ("sdxl_ambient.checkpoint", "CheckpointError")]
    return tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)
