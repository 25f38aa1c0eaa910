"""Shared by all tests: the shipped miniature SDXL, a few of its pictures, and a machine without a network."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it
# One thread for each of several processes, which would wait for each other. A worker inherits what the first process sets.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

from pathlib import Path

import pytest
import torch
from support.pictures import REPOSITORY, copy_emoji

from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.models.base import load_schedule
from sdxl_ambient.models.load import load_encoders, load_unet
from sdxl_ambient.store.build import build_store
from sdxl_ambient.store.settings import StoreSettings

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


# The user's own folder of keys stays as it is, whatever a test forgets.
os.environ["SDXL_AMBIENT_HOME"] = tempfile.mkdtemp(prefix="sdxl_ambient_tests_")


@pytest.fixture(autouse=True, scope="module")
def shared_home(tmp_path_factory):
    """A folder of keys and register for what the tests of a file share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDXL_AMBIENT_HOME", str(tmp_path_factory.mktemp("home") / "sdxl_ambient"))
        yield


@pytest.fixture
def tmp_path(tmp_path) -> Path:
    """A folder with no other test's folder beside it, since stores look around for others."""
    folder = tmp_path / "t"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def private_home(tmp_path_factory, monkeypatch) -> Path:
    """A folder of keys and register for each test and the processes that it starts."""
    folder = tmp_path_factory.mktemp("home") / "sdxl_ambient"
    monkeypatch.setenv("SDXL_AMBIENT_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def miniature() -> Path:
    """The miniature SDXL pipeline, in diffusers format."""
    return REPOSITORY / "miniature" / "pipeline"


@pytest.fixture(scope="session")
def encoders(miniature):
    """VAE, tokenizers and text encoders of the miniature. Not to be changed."""
    return load_encoders(str(miniature))


@pytest.fixture(scope="session")
def schedule(miniature):
    """SDXL's own noise schedule."""
    return load_schedule(str(miniature))


@pytest.fixture(scope="session")
def unet(miniature):
    """The miniature's UNet. Not to be changed: copy it with ``copy.deepcopy``."""
    return load_unet(miniature).eval().requires_grad_(False)


@pytest.fixture
def emoji(tmp_path) -> Path:
    """An imagefolder of six 64×64 RGBA emoji."""
    return copy_emoji(tmp_path / "emoji", 6)


@pytest.fixture
def build(encoders, schedule):
    """build_store with the miniature and small defaults."""

    def run(
        images, output, *, resolution=64, center=True, encoders=encoders, schedule=schedule, log=lambda message: None,
        state=None, check=lambda: None, **settings,
    ):  # fmt: skip
        settings = StoreSettings(Geometry(resolution, center), **settings)
        return build_store(images, output, encoders, schedule, settings, state=state, log=log, check=check)

    return run


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """Three real rectangular photographs with captions, one of them upright only through its EXIF orientation."""
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_image

    folder = tmp_path_factory.mktemp("photographs")
    Image.fromarray(data.coffee()).save(folder / "coffee.png")  # 400 × 600
    Image.fromarray(load_sample_image("china.jpg")).save(folder / "china.jpg", quality=95)  # 427 × 640
    turned = Image.fromarray(load_sample_image("flower.jpg"))  # 427 × 640 in the file, 640 × 427 as seen
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "flower.jpg", exif=exif, quality=95)
    for name in ("coffee", "china", "flower"):
        (folder / f"{name}.txt").write_text(f"a photograph, {name}\n")
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """The networks are so small that threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
