"""Pictures from folders, parquet and webdataset files and data sets, in one order, with no clean copy left behind."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import PartialState
from support.pictures import copy_emoji
from support.stores import equal, latents_in

from sdxl_ambient.config.parser import build_options
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.errors import ImageError, ImagesMissing
from sdxl_ambient.images import sources
from sdxl_ambient.images.captions import Columns
from sdxl_ambient.images.load import load_rgb
from sdxl_ambient.images.sources import HubDataset, open_records
from sdxl_ambient.store.reader import Presentation
from sdxl_ambient.store.scan import content_hash
from sdxl_ambient.training.settings import stores_settings
from sdxl_ambient.training.stores import open_stores


@pytest.fixture
def said():
    return []


@pytest.fixture
def read(said):
    """open_records, by the names of the options, that remembers what it says."""

    def run(folder=None, *, dataset_name=None, dataset_config_name=None, dataset_split="train", **columns):
        source = folder if dataset_name is None else HubDataset(dataset_name, dataset_config_name, dataset_split)
        columns = Columns(**{name.removesuffix("_column"): value for name, value in columns.items()})
        return open_records(source, columns, log=said.append)

    return run


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """The folders that clean copies could stay in: of the data sets library, and of temporary files."""
    import tempfile

    import datasets

    folders = {name: tmp_path / name for name in ("cache", "downloads", "temporary")}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folders["cache"]))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(folders["downloads"]))
    monkeypatch.setattr(tempfile, "tempdir", str(folders["temporary"]))
    return folders


def rows_of(emoji: Path) -> list[dict]:
    """The bytes and captions of a folder's pictures, in the order of their names."""
    rows = [json.loads(line) for line in (emoji / "metadata.jsonl").read_text().splitlines()]
    rows = sorted(rows, key=lambda r: r["file_name"])
    return [{"name": r["file_name"], "bytes": (emoji / r["file_name"]).read_bytes(), "text": r["text"]} for r in rows]


def parquet(folder: Path, rows, shards=2, feature="struct", **columns) -> Path:
    """The same pictures as parquet files, as the Hub has them, or as plain bytes."""
    folder.mkdir(parents=True)
    cut = -(-len(rows) // shards)
    for k in range(shards):
        part = slice(k * cut, (k + 1) * cut)
        pictures = [{"bytes": r["bytes"], "path": r["name"]} if feature == "struct" else r["bytes"] for r in rows[part]]
        table = {"image": pictures, "text": [r["text"] for r in rows[part]], **{n: v[part] for n, v in columns.items()}}
        pq.write_table(pa.table(table), folder / f"train-{k:05d}.parquet")
    return folder


def webdataset(folder: Path, rows, caption="txt", **more) -> Path:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i, row in enumerate(rows):
            texts = {
                "txt": f" {row['text']}\n",
                "json": json.dumps({"text": row["text"], **{k: v[i] for k, v in more.items()}}),
            }
            for suffix, data in (("png", row["bytes"]), (caption, texts[caption].encode())):
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def jpeg(data: bytes) -> bytes:
    """A picture's recompressed copy."""
    file = io.BytesIO()
    load_rgb(data).save(file, "JPEG", quality=80)
    return file.getvalue()


def shown(records) -> list[tuple]:
    return [(content_hash(load_rgb(r.read())), r.captions, r.t_n) for r in records]


# -- every source gives the same pictures -----------------------------------------------------------------------


def test_parquet_webdataset_and_data_sets_hold_what_the_folder_holds(emoji, tmp_path, read, said, caches):
    want, rows = shown(read(emoji)), rows_of(emoji)
    assert shown(read(parquet(tmp_path / "parquet [1]", rows))) == want  # a pattern, if taken for one
    packed = parquet(tmp_path / "parquet", rows)
    assert [r.name for r in read(packed)][:1] == [f"row 0 ({rows[0]['name']})"]
    assert shown(read(None, dataset_name=str(packed), dataset_split="train")) == want
    assert shown(read(None, dataset_name=str(emoji))) == want  # an imagefolder, whose rows name files
    assert not said
    assert shown(read(parquet(tmp_path / "bytes", rows, feature="bytes"))) == want
    for caption in ("txt", "json"):
        assert shown(read(webdataset(tmp_path / caption, rows, caption))) == want
    assert "note: the pictures are taken from the column 'png' (--image_column)" in said
    assert "note: --caption_column: 'text' is not there, 'txt' is taken" in said
    assert "note: --caption_column: 'text' is not there, 'json.text' is taken" in said


def test_lists_of_captions_and_levels_come_from_columns(emoji, tmp_path, read, caches):
    rows = rows_of(emoji)
    captions = [["a", "b"], ["c"], [], None, ["", "d"], ["e"]]
    levels = [300, None, -1, 0, 998, 5]
    folder = parquet(tmp_path / "p", rows, captions=captions, level=levels)
    records = read(folder, caption_column="captions", t_n_column="level")
    assert [r.captions for r in records] == [("a", "b"), ("c",), (), (), ("d",), ("e",)]
    assert [r.t_n for r in records] == levels
    floats = parquet(tmp_path / "f", rows, level=[300.0, float("nan"), -1.0, 0.0, 998.0, 5.0])
    assert [r.t_n for r in read(floats, t_n_column="level")] == levels
    inside = webdataset(tmp_path / "w", rows, "json", level=[7, 8, 9, 10, 11, None])
    assert [r.t_n for r in read(inside, t_n_column="level")] == [7, 8, 9, 10, 11, None]
    with pytest.raises(ImagesMissing, match=r"p, row 1: --t_n_column: 'level' is 999; allowed are 0 to 998"):
        read(parquet(tmp_path / "q" / "p", rows, level=[1, 999, 1, 1, 1, 1]), t_n_column="level")


def test_rows_without_a_picture_have_a_reason(emoji, tmp_path, read, caches):
    rows = rows_of(emoji)[:3]
    rows[1] = {**rows[1], "bytes": None, "name": None}
    rows[2] = {**rows[2], "bytes": b"no picture"}
    records = read(parquet(tmp_path / "p", rows, shards=1))
    assert [r.name for r in records] == [f"row 0 ({rows[0]['name']})", "row 1", f"row 2 ({rows[2]['name']})"]
    for record, reason in zip(records[1:], ("the row holds no picture", "not an image"), strict=True):
        with pytest.raises(ImageError, match=reason):
            load_rgb(record.read())


# -- errors ------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named_in_one_line(emoji, tmp_path, read, caches):
    folder = parquet(tmp_path / "p", rows_of(emoji), other=list(range(6)), depth=[b"x"] * 6)
    for keywords, message in (
        (dict(caption_column="caption"), "--caption_column: 'caption' is not one of: image, text, other, depth (.*p)"),
        (dict(t_n_column="level"), "--t_n_column: 'level' is not one of: image, text, other, depth"),
        (dict(image_column="picture"), "--image_column: 'picture' is not one of: image, text, other, depth"),
        (dict(image_column="other"), "--image_column: 'other' holds no pictures; allowed: image, depth"),
        (dict(caption_column="other"), r"p, row 0: 'other' is not a text or a list of texts: 0"),
    ):
        with pytest.raises(ImagesMissing, match=message) as error:
            read(folder, **keywords)
        assert "\n" not in str(error.value)
    assert [r.captions for r in read(folder, caption_column="caption", captions_needed=False)] == [()] * 6
    with pytest.raises(ImagesMissing, match=r"--dataset_name: '.*p' can't be loaded: Unknown split \"test\""):
        read(None, dataset_name=str(folder), dataset_split="test")
    with pytest.raises(ImagesMissing, match="--dataset_name: 'nobody/nothing' can't be loaded: ") as error:
        read(None, dataset_name="nobody/nothing")
    assert "\n" not in str(error.value)
    (folder / "b.tar").write_bytes(b"")
    with pytest.raises(ImagesMissing, match="holds .parquet and .tar files; allowed is one kind"):
        read(folder)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ImagesMissing, match="--train_data_dir: '.*broken' can't be loaded: ") as error:
        read(tmp_path / "broken")
    assert "\n" not in str(error.value)
    assert not any(caches["temporary"].iterdir())  # whatever went wrong


def test_a_folder_with_images_is_read_as_one(emoji, read):
    pq.write_table(pa.table({"embedding": [1.0]}), emoji / "notes.parquet")
    assert len(read(emoji)) == 6


def test_a_missing_package_is_named(emoji, tmp_path, read, monkeypatch, caches):
    folder = parquet(tmp_path / "p", rows_of(emoji))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImagesMissing, match=r"--train_data_dir: needs the package datasets, .*\(pip install datasets\)"):
        read(folder)


# -- nothing clean stays -------------------------------------------------------------------------------------------


def test_no_clean_copy_is_left_in_a_cache_or_beside_the_store(emoji, tmp_path, build, caches, monkeypatch):
    """The Arrow file lies in a folder of mode 700, and has no name any more when the first picture is read."""
    rows, seen = rows_of(emoji), {}
    load = sources._load

    def watched(*arguments, cache_dir, **keywords):
        data = load(*arguments, cache_dir=cache_dir, **keywords)
        seen["mode"] = os.stat(cache_dir).st_mode & 0o777
        seen["bytes"] = b"".join(p.read_bytes() for p in Path(cache_dir).rglob("*.arrow"))
        return data

    monkeypatch.setattr(sources, "_load", watched)
    folder = parquet(tmp_path / "source", rows)
    build(folder, tmp_path / "stores" / "s", noise_key_file=tmp_path / "key")
    assert seen["mode"] == 0o700 and all(row["bytes"] in seen["bytes"] for row in rows)  # there was one
    for place in (*caches.values(), tmp_path / "stores"):
        everything = b"".join(p.read_bytes() for p in place.rglob("*") if p.is_file())
        for row in rows:
            assert row["bytes"][60:160] not in everything
            assert np.asarray(load_rgb(row["bytes"]))[28:36].tobytes() not in everything
    assert not any(caches["temporary"].iterdir()) and not any(p.suffix == ".arrow" for p in tmp_path.rglob("*"))
    # The same observation as of the folder.
    build(emoji, tmp_path / "again" / "s", noise_key_file=tmp_path / "key")
    assert equal(latents_in(tmp_path / "stores" / "s"), latents_in(tmp_path / "again" / "s"))


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_two_processes_share_one_copy_and_see_one_order(tmp_path, broken, emoji):
    folder = parquet(tmp_path / "p", rows_of(copy_emoji(tmp_path / "more", 20)))
    if broken:
        (folder / "train-00001.parquet").write_bytes(b"no parquet")
    (tmp_path / "temporary").mkdir()
    program = (
        "import sys, hashlib\n"
        "from accelerate import PartialState\n"
        "from sdxl_ambient.images.sources import open_records\n"
        "state = PartialState(cpu=True)\n"
        "try:\n"
        "    records = open_records(sys.argv[1], state=state)\n"
        "    said = f'{hashlib.sha256(b\"\".join(r.read() for r in records)).hexdigest()} {len(records)}'\n"
        "except ValueError as error:\n"
        "    said = f'error: {error}'\n"
        "sys.stdout.write(said + '\\n')\n"  # at once, as the other process writes too
        "sys.stdout.flush()\n"
        "state.wait_for_everyone()\n"
        "state.destroy_process_group()\n"  # else the one that ends first may take the other with it
    )
    (tmp_path / "program.py").write_text(program)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(tmp_path / "program.py"), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3]),
             "TMPDIR": str(tmp_path / "temporary"), "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.split("\n")[:2]
    assert lines[0] == lines[1] and (lines[0].startswith("error: --train_data_dir") if broken else lines[0].endswith(" 20"))
    assert not list((tmp_path / "temporary").rglob("*.arrow")) and not list(tmp_path.rglob("cache/**/*.arrow"))
    assert not list((tmp_path / "temporary").glob("sdxl_ambient-*"))


# -- training's two stores -------------------------------------------------------------------------------------------


@pytest.fixture
def opened(miniature, schedule, tmp_path):
    """Both stores of a run with these options."""

    def run(**options):
        usual = {"pretrained_model_name_or_path": str(miniature), "output_dir": str(tmp_path / "run"), "resolution": 64}
        settings = stores_settings(build_options(TrainOptions, {**usual, **options}))
        return open_stores(settings, PartialState(), schedule, Presentation())

    return run


def test_both_stores_of_a_run_come_from_splits_of_one_data_set(emoji, tmp_path, caches, opened):
    rows = rows_of(emoji)
    folder = parquet(tmp_path / "p", [*rows[:3], {**rows[0], "bytes": jpeg(rows[0]["bytes"])}], shards=1)
    heldout = parquet(tmp_path / "h", [*rows[4:], {**rows[4], "bytes": jpeg(rows[4]["bytes"])}], shards=1)
    (heldout / "train-00000.parquet").rename(folder / "test-00000.parquet")
    where = dict(dataset_name=str(folder), heldout_split="test", train_text_encoder=True)
    train, heldout = opened(**where, near_duplicates="drop")
    assert len(train) == 3 and train.manifest["counts"]["skipped"] == 1
    assert len(heldout) == 3 and heldout.manifest["near_duplicates"] is None  # nothing is trained on them
    assert all(s.manifest["tokens"] == "tokens.safetensors" for s in (train, heldout))
    known = {content_hash(load_rgb(r["bytes"])) for r in rows}
    assert {i["content"] for i in train.images} == {content_hash(load_rgb(r["bytes"])) for r in rows[:3]}
    assert len({i["content"] for i in heldout.images} & known) == 2


def test_the_heldout_latents_of_a_run_on_noisy_ones_are_noisy_too(tmp_path, opened):
    import torch
    from safetensors.torch import save_file

    for name in ("train", "heldout"):
        (tmp_path / name).mkdir()
        save_file({"latent": torch.full((4, 8, 8), float(len(name)))}, tmp_path / name / "a.safetensors")
    folders = dict(train_data_dir=str(tmp_path / "train"), heldout_data_dir=str(tmp_path / "heldout"))
    train, heldout = opened(**folders, pre_noised=True, instance_prompt="a picture")
    for store, value in ((train, 5), (heldout, 7)):
        assert store.manifest["fingerprint"]["latent"]["pre_noised"] and "tokens" not in store.manifest
        (x,) = latents_in(store.folder).values()
        assert (x == value).all()
