"""Folders as people have them: strange files beside good ones, and a run that is broken off."""

import math

import numpy as np
import pytest
from PIL import Image
from support.pictures import REPOSITORY, copy_emoji

from benchmarks.measuring import peak_of
from eval.embedders.registry import Embedder, load_embedder
from eval.embedding import embed_images
from eval.images import read_folder
from eval.memorization import main
from sdxl_ambient.provenance import read_json

USABLE = ("animated.gif", "cmyk.jpg", "grey.png", "luminance.png", "sixteen_bits.png", "wide.png")
UNUSABLE = {
    "bomb_bits.png": "more than 178956970 pixels",
    "bomb_palette.png": "more than 178956970 pixels",
    "empty.webp": "not an image, or of an unknown format",
    "one_pixel.png": "too small: 1x1 pixels, at least 8 on each side are needed",
    "truncated.png": "unreadable: image file is truncated",
    "words.jpg": "not an image, or of an unknown format",
}
MOST_MEMORY = 1 << 30  # bytes; one of the 16,000 × 16,000 pictures as RGB would take three quarters of it, twice over


def make_awkward(folder, seed):
    """Six files that count and six that can't be used, beside what is in the folder; other pictures for another seed."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((60, 48), Image.Resampling.BICUBIC)
    turned = smooth.transpose(Image.Transpose.ROTATE_90)
    Image.new("RGB", (64, 64), (80 + seed, 80, 80)).save(folder / "grey.png")
    smooth.convert("L").save(folder / "luminance.png")
    Image.fromarray(rng.integers(0, 65535, (40, 30), dtype=np.uint16)).save(folder / "sixteen_bits.png")
    Image.fromarray(rng.integers(0, 255, (40, 16_000, 3), dtype=np.uint8)).save(folder / "wide.png", compress_level=1)
    frames = [turned.convert("P"), smooth.resize(turned.size).convert("P")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(rng.integers(0, 255, (6, 6, 4), dtype=np.uint8), "CMYK").resize((48, 48)).save(folder / "cmyk.jpg")
    for name, mode in (("bomb_bits.png", "1"), ("bomb_palette.png", "P")):
        Image.new(mode, (16_000, 16_000), seed % 2).save(folder / name)
        assert (folder / name).stat().st_size < 1 << 20
    (folder / "empty.webp").touch()
    Image.new("RGB", (1, 1), (seed, 0, 0)).save(folder / "one_pixel.png")
    whole = (folder / "sixteen_bits.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "words.jpg").write_text(f"no picture {seed}")
    return folder


def test_an_evaluation_counts_what_it_can_use_and_lists_the_rest(tmp_path):
    train = make_awkward(copy_emoji(tmp_path / "train", 60), 1)
    generated = make_awkward(copy_emoji(tmp_path / "generated", 3, "pretrain"), 2)
    out = tmp_path / "out"
    flags = ["--generated_dir", f"model={generated}", "--train_data_dir", str(train), "--output_dir", str(out)]
    flags += ["--heldout_data_dir", str(REPOSITORY / "miniature/data/heldout")]
    grown, _, code = peak_of(lambda: main(flags))
    assert code == 0 and grown < MOST_MEMORY
    report = read_json(out / "report.json")
    figures = report["models"]["model"]["samplers"]["given"]
    reasons = {row["file"]: row["reason"] for row in figures["excluded"]}
    assert reasons == UNUSABLE | {"truncated.png": reasons["truncated.png"]}
    assert reasons["truncated.png"].startswith(UNUSABLE["truncated.png"])
    files = [row["file"] for row in figures["images"]]
    assert set(USABLE) < set(files) and figures["n_generated"] == len(files) == 3 + len(USABLE)
    # The uniform image, (82, 80, 80), resembles the training image of (81, 80, 80); no figure is spoilt by it.
    likeness = (math.cos(math.pi / 255) + 2) / 3
    assert figures["images"][files.index("grey.png")]["similarity_to_train"] == pytest.approx(likeness, abs=2e-6)
    assert all(figures[name] is not None for name in ("fd_pixels", "fd_embedding", "kid", "vendi", "prdc"))

    data = report["data"]["train"]
    left_out = {row["file"]: row["reason"] for row in data["excluded"]}
    assert not set(USABLE) & set(left_out) and set(UNUSABLE) <= set(left_out)
    rest = {file: reason for file, reason in left_out.items() if file not in UNUSABLE}
    assert all(reason.startswith(("same file as", "near-duplicate of")) for reason in rest.values())
    assert data["n_images"] == 60 + len(USABLE) - len(rest)
    page = (out / "index.html").read_text()
    for file, reason in UNUSABLE.items():
        assert page.count(file) == 2 and reason in page, file


@pytest.mark.parametrize("name", ["pooled_pixels", "fingerprint"])
def test_other_stages_features_of_awkward_images_are_finite(tmp_path, name):
    found = embed_images(read_folder(make_awkward(copy_emoji(tmp_path / "set", 1), 3)), load_embedder(name), tmp_path / "c")
    assert len(found) == 1 + len(USABLE) and np.isfinite(found.features).all()
    assert {row["file"] for row in found.images.excluded} == set(UNUSABLE)


def test_an_interrupted_embedding_keeps_what_it_did_and_computes_only_the_rest(tmp_path, monkeypatch):
    """Ten images in batches of two and shards of four, broken off (Ctrl-C) in the fourth batch."""
    monkeypatch.setattr("eval.embedding._SHARD", 4)
    images, plain = read_folder(copy_emoji(tmp_path / "set", 10)), load_embedder("pixel")
    batches = []

    def network(batch):
        batches.append(len(batch))
        if len(batches) == 4:
            raise KeyboardInterrupt
        return plain.network(batch)

    interrupted = Embedder("pixel", plain.preprocessing, network)
    assert interrupted.key == plain.key
    with pytest.raises(KeyboardInterrupt):
        embed_images(images, interrupted, tmp_path / "cache", batch_size=2)
    folder = tmp_path / "cache" / plain.key
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(before) == 2  # a whole shard and what was pending
    resumed = embed_images(images, interrupted, tmp_path / "cache", batch_size=2)
    assert resumed.computed == 4 and batches == [2] * 6
    assert all(path.stat().st_mtime_ns == at for path, at in before.items()) and all(
        not path.name.startswith(".") for path in folder.iterdir()
    )
    whole = embed_images(images, plain, tmp_path / "other", batch_size=2)
    assert whole.computed == 10
    np.testing.assert_array_equal(resumed.embeddings, whole.embeddings)
    assert embed_images(images, interrupted, tmp_path / "cache", batch_size=2).computed == 0
