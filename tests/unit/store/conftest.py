"""Stores that the tests of reading share."""

import json
import shutil

import pytest
from accelerate import PartialState
from support.pictures import copy_emoji

from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.store.build import build_store
from sdxl_ambient.store.settings import StoreSettings


@pytest.fixture(scope="session")
def store(tmp_path_factory, encoders, schedule):
    """A store of six emoji, two to a shard; one of them twice, with another caption."""
    folder = tmp_path_factory.mktemp("data")
    images = copy_emoji(folder / "images", 6)
    first = sorted(images.glob("*.png"))[0]
    (images / "copy.png").write_bytes(first.read_bytes())
    (images / "copy.txt").write_text("another caption of the same picture")
    build_store(
        images, folder / "store", encoders, schedule, StoreSettings(Geometry(64), shard_size=2), state=PartialState(),
        log=lambda message: None,
    )  # fmt: skip
    return folder / "store"


@pytest.fixture(scope="session")
def bucketed(tmp_path_factory, encoders, schedule, photographs):
    """Three photographs, lying and upright, and four square emoji, in three sizes; the store has tokens."""
    folder = tmp_path_factory.mktemp("bucketed")
    images = copy_emoji(folder / "images", 4)
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    for path in sorted(photographs.iterdir()):
        shutil.copy(path, images)
        if path.suffix != ".txt":
            rows.append({"file_name": path.name, "text": f"a photograph, {path.stem}"})
    (images / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    geometry = Geometry(64, False, ((48, 80), (64, 64), (80, 48)))
    build_store(
        images, folder / "store", encoders, schedule, StoreSettings(geometry, keep_tokens=True), state=PartialState(),
        log=lambda message: None,
    )  # fmt: skip
    return folder / "store"


@pytest.fixture
def copied(store, tmp_path):
    return shutil.copytree(store, tmp_path / "store")
