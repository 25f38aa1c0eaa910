"""Converts a fully fine-tuned UNet: into a pipeline's folder, or one file in the original release's layout."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from transformers import AutoTokenizer

from sdxl_ambient.errors import InterchangeError, ModelError
from sdxl_ambient.formats.files import check_files, link, new_folder, part_state, write_tensors
from sdxl_ambient.formats.find import CONFIG_FILE, UNET_FILE, part_files, unet_file, unet_folder
from sdxl_ambient.formats.names import unet_shapes
from sdxl_ambient.formats.original import original_model
from sdxl_ambient.formats.record import (
    ARCHITECTURE,
    GENERATIVE_MODELS,
    INFO_FILE,
    model_metadata,
    public_info,
    read_training_info,
)
from sdxl_ambient.models.base import check_sdxl, load_schedule, unet_config, with_prediction
from sdxl_ambient.models.load import base_folder, load_text_encoder, load_unet_file
from sdxl_ambient.models.parts import load_part
from sdxl_ambient.models.prediction import check_prediction
from sdxl_ambient.models.single_file import TEXT_ENCODERS, VAE, network_of, stored_dtype
from sdxl_ambient.models.vae import load_vae
from sdxl_ambient.provenance import read_json, write_json

_SCHEDULER = "scheduler/scheduler_config.json"
_DESCRIPTIONS = (".json", ".txt", ".model")  # configurations and tokenizers; weights are taken by their own names


def export_unet(
    unet: str | Path,
    output: Path,
    *,
    format: str,
    base: str,
    revision: str | None = None,
    prediction_type: str | None = None,
    dtype: torch.dtype | None = None,
    title: str | None = None,
) -> str:
    """Convert a fully fine-tuned UNet. Returns the line that says what was written.

    Args:
        unet: a training run, a UNet's folder, a training state, or a .safetensors file.
        output: the folder to write, for ``single_file`` the file. Nothing may be there.
        format: ``pipeline`` or ``single_file``.
        base: the base model, a folder or a name on the Hub, whose other parts are used.
        dtype: of the weights in a single file; by default as they are.
        title: what programs show as a single file's name; by default one of what training recorded, else the output's.

    Raises:
        InterchangeError, ModelError: one that is unreadable, incomplete, or not for this base.
        OSError: an output that can't be written; nothing is left of it then.
    """
    index = check_sdxl(base, revision, prediction_type=prediction_type)
    with _as_folder(base_folder(base, revision), output, index) as folder:
        unet, config = Path(unet), unet_config(folder)
        info, facts = public_info(read_training_info(unet)), _base_facts(folder, config, prediction_type)
        if (trained := info.get("prediction_type", facts["prediction_type"])) != facts["prediction_type"]:
            raise InterchangeError(
                f"the UNet {unet} was trained to predict {trained}, but the scheduler of {base} says "
                f"{facts['prediction_type']}; give the base that it was trained from, or --prediction_type"
            )
        state = fine_tuned_unet(unet, folder, config, prediction_type)
        if "prediction_type" not in info:
            _check_prediction(state, folder, config, prediction_type, str(unet))
        if format == "pipeline":
            parts = [name for name, value in index.items() if isinstance(value, (list, tuple)) and value[0]]
            scheduler = with_prediction(_scheduler(folder), prediction_type)
            return _write_pipeline(output, folder, parts, state, unet_folder(unet), info, scheduler)
        return _write_single_file(output, folder, state, config, {**facts, **info}, dtype, title)


def _check_prediction(
    state: dict[str, torch.Tensor], base: Path, config: dict, prediction_type: str | None, source: str
) -> None:
    """A UNet that doesn't say what it was trained to predict is asked. Raises ModelError where the scheduler is wrong."""
    unet = network_of(UNet2DConditionModel, state, config, None, torch.float32)
    check_prediction(unet, load_schedule(base, prediction_type=prediction_type), repr(source), prediction_type)


@contextmanager
def _as_folder(base: Path, output: Path, index: dict) -> Iterator[Path]:
    """The base as a pipeline's folder, but for its UNet's weights; one in a single file is unpacked beside ``output``."""
    if base.is_dir():
        yield base
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent) as temporary:
        folder = Path(temporary)
        write_json(folder / "model_index.json", index)
        write_json(folder / "unet" / CONFIG_FILE, unet_config(base))
        load_vae(base, dtype=stored_dtype(base, VAE)).save_pretrained(folder / "vae")
        for part, prefix in TEXT_ENCODERS.items():
            load_text_encoder(base, part, dtype=stored_dtype(base, prefix)).save_pretrained(folder / part)
        for part in ("tokenizer", "tokenizer_2"):
            load_part(AutoTokenizer, base, part, subfolder=part).save_pretrained(folder / part)
        load_part(EulerDiscreteScheduler, base, "scheduler", subfolder="scheduler").save_pretrained(folder / "scheduler")
        yield folder


def fine_tuned_unet(path: Path, base: Path, config: dict, prediction_type: str | None = None) -> dict[str, torch.Tensor]:
    """The UNet's tensors by diffusers' names, as many and of the shapes that the base's configuration says.

    Raises:
        InterchangeError, ModelError: unreadable, incomplete or of another architecture.
    """
    file = unet_file(path)
    folder = unet_folder(path)
    if file is None and folder:
        state = part_state(folder)
    else:
        state = load_unet_file(file or path, base, prediction_type=prediction_type).state_dict()
    wanted, shapes = unet_shapes(config), {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != shapes:
        other = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
        have, want = (one.get(other[0], "nothing") for one in (shapes, wanted))
        raise InterchangeError(
            f"the UNet {path} is incomplete, or of another architecture than that of {base}: {len(other)} weights differ, "
            f"such as {other[0]} (shape: {have} instead of {want})"
        )
    return state


def _base_facts(base: Path, config: dict, prediction_type: str | None) -> dict:
    """What the base says of every UNet that is trained from it, under the names in training.json."""
    side = config.get("sample_size")
    factor = 2 ** (_vae_levels(base) - 1)
    return {
        "prediction_type": prediction_type or _scheduler(base).get("prediction_type", "epsilon"),
        **({"resolution": side * factor} if isinstance(side, int) else {}),
    }


def _scheduler(base: Path) -> dict:
    return _configuration(base / _SCHEDULER)


def _vae_levels(base: Path) -> int:
    """How many resolutions the base's VAE has."""
    file = base / "vae" / "config.json"
    widths = _configuration(file).get("block_out_channels")
    if not isinstance(widths, list) or not 0 < len(widths) < 10:
        raise ModelError(f"{file} can't be read: its block_out_channels are not a list of the VAE's widths")
    return len(widths)


def _configuration(file: Path) -> dict:
    content = read_json(file)
    if not isinstance(content, dict):
        raise ModelError(f"{file} can't be read: it is not a JSON object")
    return content


def _write_pipeline(
    output: Path,
    base: Path,
    parts: Sequence[str],
    unet: dict[str, torch.Tensor],
    own: Path | None,
    info: dict,
    scheduler: dict,
) -> str:
    """A diffusers pipeline: the base's parts, of which the weights are linked, with the UNet in its place.

    ``own``: the folder that the UNet's weights lie in and are linked from; None to write them.
    """
    for part in parts:
        # Linked as they are, the weights are looked at here.
        if part != "unet" and _has_weights(base / part):
            check_files(part_files(base / part))
    with new_folder(output) as folder:
        shutil.copyfile(base / "model_index.json", folder / "model_index.json")
        for part in parts:
            _copy_part(base / part, folder / part, weights=part != "unet")
        write_json(folder / _SCHEDULER, scheduler)
        if own:
            for file in part_files(own):
                link(file, folder / "unet" / file.name)
        else:
            write_tensors(folder / "unet" / UNET_FILE, unet, {"format": "pt"})
        if info:
            write_json(folder / INFO_FILE, info)
    size = sum(file.stat().st_size for file in output.rglob("*.safetensors"))
    return f"{output}: a pipeline of {', '.join(parts)}, {len(unet)} tensors of the UNet, {size:,} bytes of weights"


def _copy_part(source: Path, target: Path, weights: bool) -> None:
    target.mkdir()
    for file in sorted(source.iterdir()):
        if file.suffix in _DESCRIPTIONS and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
    if weights and _has_weights(source):
        for file in part_files(source):
            link(file, target / file.name)


def _has_weights(part: Path) -> bool:
    # Tokenizers and schedulers have other names for their configurations.
    return (part / "config.json").is_file()


def _write_single_file(
    output: Path,
    base: Path,
    unet: dict[str, torch.Tensor],
    config: dict,
    info: dict,
    dtype: torch.dtype | None,
    title: str | None,
) -> str:
    """One SDXL file in the original release's layout: UNet, VAE and both text encoders."""
    state = original_model(
        {"unet": unet, **{part: part_state(base / part) for part in ("vae", "text_encoder", "text_encoder_2")}},
        config=config,
        vae_levels=_vae_levels(base),
        predicts_v=info["prediction_type"] == "v_prediction",
        zero_snr=bool(_scheduler(base).get("rescale_betas_zero_snr")),
        dtype=dtype,
    )
    metadata = model_metadata(info, ARCHITECTURE, GENERATIVE_MODELS, title or (None if "t_n" in info else output.stem))
    write_tensors(output, state, {"format": "pt", **metadata})
    return f"{output}: an SDXL model in the original layout, {len(state)} tensors, {output.stat().st_size:,} bytes"
