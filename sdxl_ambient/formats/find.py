"""Finds the files of weights: the one of a LoRA, and those of a UNet or of another part of a pipeline.

Training, sampling, the evaluation, the export and the upload all ask here, so that a path means the same to each.
"""

from __future__ import annotations

from pathlib import Path

from sdxl_ambient.errors import InterchangeError
from sdxl_ambient.formats.record import LORA_FILE, MODEL_FILE
from sdxl_ambient.provenance import read_json
from sdxl_ambient.variants import only_variant

UNET_FILE = "diffusion_pytorch_model.safetensors"  # as diffusers names it
CONFIG_FILE = "config.json"
_PART_FILES = (UNET_FILE, "model.safetensors")  # of diffusers' models, and of transformers'


def lora_file(path: str | Path) -> Path:
    """The .safetensors file of a LoRA: ``path`` itself, or the one in the folder ``path``.

    In a folder it is ``pytorch_lora_weights.safetensors``, else the only .safetensors file.

    Raises:
        InterchangeError: nothing there, another kind of file, or a folder with none or with several.
    """
    path = Path(path)
    if path.is_file():
        return _safetensors(path)
    if not path.is_dir():
        raise InterchangeError(f"{str(path)!r} does not exist")
    if (path / LORA_FILE).is_file():
        return path / LORA_FILE
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InterchangeError(f"{str(path)!r} does not hold {LORA_FILE}")
    if len(files) > 1:
        raise InterchangeError(f"{str(path)!r} holds {len(files)} .safetensors files; give one of them")
    return files[0]


def unet_file(path: str | Path) -> Path | None:
    """The one file that a UNet's weights are in: ``path`` itself, or that of the training state ``path``.

    None for a folder with a UNet's configuration, or with a ``unet`` folder.
    """
    path = Path(path)
    if path.is_file():
        return path
    state = path / MODEL_FILE
    return state if state.is_file() and not any((path / name).exists() for name in ("unet", CONFIG_FILE)) else None


def unet_folder(path: str | Path) -> Path | None:
    """The folder with a UNet's configuration and weights that ``path`` is or holds; None for a file or a training state."""
    path = Path(path)
    if unet_file(path) is not None:
        return None
    return path / "unet" if (path / "unet").is_dir() else path


def unet_files(path: str | Path) -> list[Path]:
    """All files of a UNet: one .safetensors file, or a folder's configuration, weights and their index.

    Args:
        path: a file, a training state, a UNet's folder, or one that holds ``unet``.

    Raises:
        InterchangeError: nothing there, another kind of file, or a folder without a configuration or weights.
    """
    path = Path(path)
    if not path.exists():
        raise InterchangeError(f"{str(path)!r} does not exist")
    if (file := unet_file(path)) is not None:
        return [_safetensors(file)]
    folder = path / "unet" if (path / "unet").is_dir() else path
    config = folder / CONFIG_FILE
    weights, index = (sorted(folder.glob(pattern)) for pattern in ("*.safetensors", "*.safetensors.index.json"))
    if not config.is_file() or not weights:
        raise InterchangeError(f"{str(path)!r} does not hold a UNet's .safetensors files")
    return [config, *weights, *index]


def part_files(folder: Path) -> list[Path]:
    """The weights that are loaded of one part of a pipeline: one file, or shards with their index first.

    A variant (``fp16``, …) is taken where there are no other weights. Other formats are passed over.

    Raises:
        InterchangeError: none there, or a damaged index.
    """
    own = only_variant(folder)
    for name in _PART_FILES:
        stem = name.removesuffix(".safetensors") + (f".{own}" if own else "")
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
        if (index := folder / f"{name}.index{f'.{own}' if own else ''}.json").is_file():
            return [index, *(folder / shard for shard in _shards(index))]
    raise InterchangeError(f"{folder} holds no {' or '.join(_PART_FILES)}; other files of weights are not read")


def _shards(index: Path) -> list[str]:
    """The names of the files that an index lists, each beside it."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    names = set(places.values()) if isinstance(places, dict) and all(isinstance(n, str) for n in places.values()) else set()
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise InterchangeError(f"{index} can't be read: its weight_map doesn't name .safetensors files beside it")
    return sorted(names)


def _safetensors(file: Path) -> Path:
    if file.suffix != ".safetensors":
        raise InterchangeError(f"{str(file)!r} is not a .safetensors file; no other is read")
    return file
