"""LoRAs and full fine-tunes written as other programs read them."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sdxl_ambient.errors import InterchangeError, ModelError, one_line
from sdxl_ambient.formats.adapter import GENERATIVE_MODELS, Adapter, peft_file
from sdxl_ambient.formats.kohya import in_dtype, to_kohya
from sdxl_ambient.formats.names import unet_shapes
from sdxl_ambient.formats.original import original_model
from sdxl_ambient.formats.read import read_adapter
from sdxl_ambient.formats.record import ARCHITECTURE, INFO_FILE, LORA_FILE, model_metadata, public_info, read_training_info
from sdxl_ambient.models.load import LOADING_ERRORS, check_sdxl, load_unet_file, unet_file
from sdxl_ambient.provenance import atomic, read_json, write_json

UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"
_WEIGHTS = (UNET_WEIGHTS, "model.safetensors")
_DESCRIPTIONS = (".json", ".txt", ".model")  # configurations and tokenizers; weights are taken by their own names
_NO_HASH = "0" * 64


# -- files ----------------------------------------------------------------------


def write_tensors(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all, with the SHA-256 of its tensors in its metadata.

    ``modelspec.hash_sha256`` as ModelSpec defines it, of all bytes after the header; ``sshs_model_hash`` is kohya's name for
    the same.
    """
    hashes = {"modelspec.hash_sha256": f"0x{_NO_HASH}", "sshs_model_hash": _NO_HASH}
    with atomic(path) as temporary:
        save_file(state, str(temporary), metadata={**metadata, **hashes})
        _fill_in_hash(temporary)


def _fill_in_hash(path: Path) -> None:
    """Put the hash in the place that the header has for it, which lies before what is hashed."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header, digest = file.read(length), hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
        file.seek(8)
        file.write(header.replace(_NO_HASH.encode(), digest.hexdigest().encode()))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` if all goes well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of one part of a pipeline, one file or shards with their index first; variants (fp16, …) and other
    formats are passed over.

    Raises:
        InterchangeError: none there.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            return [index, *(folder / shard for shard in sorted(set(read_json(index)["weight_map"].values())))]
    raise InterchangeError(f"{folder} holds no {' or '.join(_WEIGHTS)}; other files of weights are not read")


def part_state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of one part of a pipeline, as they are stored. Raises InterchangeError."""
    state = {}
    try:
        for file in weight_files(folder):
            state.update(load_file(str(file)) if file.suffix == ".safetensors" else {})
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InterchangeError(f"{folder} can't be read: {one_line(error)}") from None
    return state


def link(source: Path, target: Path) -> None:
    """The same file by another name, or a copy where the file system has no such thing or another disk is meant."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


# -- LoRAs ----------------------------------------------------------------------


def unet_config(base: str, revision: str | None = None) -> dict:
    """The configuration of the base model's UNet. Raises ModelError where it isn't SDXL."""
    check_sdxl(base, revision)
    return dict(UNet2DConditionModel.load_config(base, subfolder="unet", revision=revision))


def export_lora(options) -> str:
    """Convert a LoRA. Returns the line that says what was written."""
    base, dtype = options.pretrained_model_name_or_path, options.dtype and getattr(torch, options.dtype)
    config = unet_config(base, options.revision) if base else None
    adapter, output = read_adapter(options.lora, config), Path(options.output)
    if options.format == "kohya":
        title = options.title or (None if adapter.info else output.stem)
        write_tensors(output, *to_kohya(adapter, options.layout, config=config, dtype=dtype, title=title))
        return "\n".join([summary(output, output, adapter), *notes(adapter)])
    state, metadata = peft_file(adapter, options.title or (None if adapter.info else output.name))
    with new_folder(output) as folder:
        write_tensors(folder / LORA_FILE, {n: in_dtype(n, t, dtype) for n, t in state.items()}, metadata)
        if adapter.info:
            write_json(folder / INFO_FILE, adapter.info)
    return summary(output, output / LORA_FILE, adapter)


def notes(adapter: Adapter) -> list[str]:
    """Where other programs read a file in kohya's format otherwise than it is meant."""
    found = []
    if adapter.uses_dora:
        found.append(
            "note: diffusers leaves DoRA's magnitudes out of this format, and ComfyUI divides by the base weights' lengths "
            "instead of the changed ones'; diffusers reads --format peft as it was trained"
        )
    if any(len({w.alpha for w in modules.values()}) > 1 for modules in adapter.parts.values()):
        found.append(
            "note: diffusers mistakes alphas that differ between modules in this format; it reads --format peft as it was "
            "trained, and programs with readers of their own (ComfyUI, kohya's scripts) this one too"
        )
    return found


def summary(output: Path, file: Path, adapter: Adapter) -> str:
    """What was written: modules per part, ranks, alphas, bytes."""
    weights = [w for modules in adapter.parts.values() for w in modules.values()]
    parts = ", ".join(f"{len(modules)} modules of {part}" for part, modules in adapter.parts.items())
    ranks, alphas = (_spread({getattr(w, name) for w in weights}) for name in ("rank", "alpha"))
    dora = ", DoRA" if adapter.uses_dora else ""
    return f"{output}: {parts}, rank {ranks}, alpha {alphas}{dora}, {file.stat().st_size:,} bytes"


def _spread(values: set[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


# -- full fine-tunes ----------------------------------------------------------------------


def base_folder(base: str, revision: str | None) -> Path:
    """The base model's folder; of one on the Hub, that in the cache, into which it is downloaded if need be."""
    if Path(base).is_dir():
        return Path(base)
    try:
        return Path(DiffusionPipeline.download(base, revision=revision, use_safetensors=True))
    except LOADING_ERRORS as error:
        raise ModelError(f"{base!r} can't be downloaded: {one_line(error)}") from None


def unet_folder(path: Path) -> Path | None:
    """The folder with a UNet's configuration and weights that ``path`` is or holds; None for a file or a training state."""
    if unet_file(path) is not None:
        return None
    return path / "unet" if (path / "unet").is_dir() else path


def fine_tuned_unet(path: Path, base: Path, config: dict) -> dict[str, torch.Tensor]:
    """The UNet's tensors by diffusers' names, as many and of the shapes that the base's configuration says.

    Raises:
        InterchangeError, ModelError: unreadable, incomplete or of another architecture.
    """
    folder = unet_folder(path)
    state = part_state(folder) if folder else load_unet_file(unet_file(path), base).state_dict()
    wanted, found = unet_shapes(config), {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != found:
        other = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise InterchangeError(
            f"the UNet {path} is incomplete, or of another architecture than that of {base}: {len(other)} weights differ, "
            f"such as {other[0]}"
        )
    return state


def export_unet(options) -> str:
    """Convert a fully fine-tuned UNet. Returns the line that says what was written."""
    index = check_sdxl(options.pretrained_model_name_or_path, options.revision)
    base, path = base_folder(options.pretrained_model_name_or_path, options.revision), Path(options.unet)
    config = unet_config(str(base))
    info, facts = public_info(read_training_info(path)), _base_facts(base, config)
    if (trained := info.get("prediction_type", facts["prediction_type"])) != facts["prediction_type"]:
        said = f"the UNet {path} was trained to predict {trained}, but the scheduler of {base} says"
        raise InterchangeError(f"{said} {facts['prediction_type']}; give the base that it was trained from")
    unet = fine_tuned_unet(path, base, config)
    if options.format == "pipeline":
        return write_pipeline(options, base, index, unet, info)
    return write_single_file(options, base, unet, config, {**facts, **info})


def _base_facts(base: Path, config: dict) -> dict:
    scheduler, vae = (read_json(base / p / f"{n}.json") for p, n in (("scheduler", "scheduler_config"), ("vae", "config")))
    side = config.get("sample_size")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return {
        "prediction_type": scheduler.get("prediction_type", "epsilon"),
        **({"resolution": side * factor} if isinstance(side, int) else {}),
    }


def write_pipeline(options, base: Path, index: dict, unet: dict, info: dict) -> str:
    """A diffusers pipeline: the base's parts, of which the weights are linked, with the UNet in its place."""
    output, parts = Path(options.output), [n for n, v in index.items() if isinstance(v, (list, tuple)) and v[0]]
    own = unet_folder(Path(options.unet))
    with new_folder(output) as folder:
        shutil.copyfile(base / "model_index.json", folder / "model_index.json")
        for part in parts:
            _copy_part(base / part, folder / part, weights=part != "unet")
        if own:
            for file in weight_files(own):
                link(file, folder / "unet" / file.name)
        else:
            write_tensors(folder / "unet" / UNET_WEIGHTS, unet, {"format": "pt"})
        if info:
            write_json(folder / INFO_FILE, info)
    size = sum(file.stat().st_size for file in output.rglob("*.safetensors"))
    return f"{output}: a pipeline of {', '.join(parts)}, {len(unet)} tensors of the UNet, {size:,} bytes of weights"


def _copy_part(source: Path, target: Path, weights: bool) -> None:
    target.mkdir()
    for file in sorted(source.iterdir()):
        if file.suffix in _DESCRIPTIONS and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
    # Tokenizers and schedulers have other names for theirs.
    if weights and (source / "config.json").is_file():
        for file in weight_files(source):
            link(file, target / file.name)


def write_single_file(options, base: Path, unet: dict, config: dict, info: dict) -> str:
    """One SDXL file in the original release's layout: UNet, VAE and both text encoders."""
    output = Path(options.output)
    state = original_model(
        unet,
        *(part_state(base / part) for part in ("vae", "text_encoder", "text_encoder_2")),
        config=config,
        vae_levels=len(read_json(base / "vae" / "config.json")["block_out_channels"]),
        predicts_v=info["prediction_type"] == "v_prediction",
        zero_snr=bool(read_json(base / "scheduler" / "scheduler_config.json").get("rescale_betas_zero_snr")),
        dtype=options.dtype and getattr(torch, options.dtype),
    )
    title = options.title or (None if "t_n" in info else output.stem)
    metadata = model_metadata(info, ARCHITECTURE, GENERATIVE_MODELS, title)
    write_tensors(output, state, {"format": "pt", **metadata})
    return f"{output}: an SDXL model in the original layout, {len(state)} tensors, {output.stat().st_size:,} bytes"
