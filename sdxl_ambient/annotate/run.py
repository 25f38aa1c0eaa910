"""Annotates a set, and writes its levels and what they were decided from."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdxl_ambient.annotate.options import ANNOTATIONS, METADATA, SETS
from sdxl_ambient.annotate.rule import cross_fit, describe
from sdxl_ambient.annotate.sets import ImageSet, check_sets, encode, read_set
from sdxl_ambient.annotate.settings import AnnotateSettings
from sdxl_ambient.devices import Placement, one_process, resolve_device
from sdxl_ambient.errors import ModelError
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.images.sources import Log
from sdxl_ambient.models.base import check_sdxl, load_schedule
from sdxl_ambient.models.vae import check_resolution, load_vae
from sdxl_ambient.provenance import atomic, hash_json, hash_tensors, write_json


def write_result(output: Path, annotations: dict, sets: Sequence[ImageSet]) -> None:
    """Links, annotations.json, and metadata.jsonl last: without it the trainer refuses the folder."""
    (output / METADATA).unlink(missing_ok=True)
    # Before the links, so that a broken-off result is known for one.
    write_json(output / ANNOTATIONS, annotations)
    for name in SETS:
        for path in (output / name).rglob("*"):
            if path.is_symlink():
                path.unlink()
    sources = {f"{one.name}/{p.record.name}": p.record.path for one in sets for p in one.pictures}
    used = [image for image in annotations["images"] if image["used"]]
    for image in used:
        link = output / image["file"]
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.abspath(sources[image["file"]]))
    rows = [{"file_name": i["file"], "text": i["text"], "t_n": i["t_n"]} for i in used]
    with atomic(output / METADATA) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def annotate(settings: AnnotateSettings, log: Log = print) -> dict[str, Any]:
    """Judge every untrusted image and write the result. Returns annotations.json.

    Raises:
        ImagesMissing, ImageError, ModelError, AnnotateError, ProbeError: with one line that says what is wrong.
    """
    base, device = settings.pretrained_model_name_or_path, resolve_device(settings.device)
    check_sdxl(base, settings.revision, log, settings.prediction_type)
    schedule = load_schedule(base, settings.revision, settings.prediction_type)
    if settings.levels[-1] >= schedule.num_timesteps - 1:
        raise ModelError(
            f"--levels: {settings.levels[-1]} leaves nothing above it to train on; this model's last is "
            f"{schedule.num_timesteps - 1}"
        )
    vae = load_vae(base, settings.pretrained_vae_model_name_or_path, revision=settings.revision, variant=settings.variant)
    check_resolution(settings.resolution, vae)
    state = one_process(device)
    trusted, untrusted = (read_set(settings, name, state, log) for name in SETS)
    sets = [trusted, untrusted]
    check_sets(trusted, untrusted, settings.folds)
    geometry = Geometry(settings.resolution, settings.center_crop)
    inputs = {"vae": hash_tensors(vae.state_dict())[:16], "schedule": schedule.hash[:16]}
    inputs.update({f"{one.name}_images": hash_json(one.contents)[:16] for one in sets})
    place = Placement(device)
    x_0 = {one.name: encode(one, place.use(vae), geometry) for one in sets}
    place.clear()
    del vae
    logits = cross_fit(settings, schedule, x_0, {one.name: one.contents for one in sets})
    annotations = describe(settings, sets, logits, inputs)
    write_result(Path(settings.output_dir), annotations, sets)
    return annotations


def training_command(settings: AnnotateSettings) -> str:
    """What trains on the result."""
    flags = {
        "pretrained_model_name_or_path": settings.pretrained_model_name_or_path,
        "pretrained_vae_model_name_or_path": settings.pretrained_vae_model_name_or_path,
        "revision": settings.revision,
        "variant": settings.variant,
        "prediction_type": settings.prediction_type,
        "train_data_dir": settings.output_dir,
        "t_n_column": "t_n",
        "resolution": settings.resolution,
        "center_crop": None if settings.center_crop else "false",
        "output_dir": f"{settings.output_dir.rstrip('/')}-trained",
    }
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    return shlex.join(["accelerate", "launch", "train_sdxl_ambient.py", *words])
