"""What an earlier run left is read again whole, or named and never believed."""

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support.pictures import copy_emoji

from eval.attacks.run import _earlier_scores, _read_part, _stored
from eval.drawing import MANIFEST, generate_images
from eval.embedding import FeatureCache, _checksum
from eval.images import read_folder
from eval.report import main as report
from eval.sets import _stored_controls
from eval.stored import arrays, read_object
from sdxl_ambient.errors import StageError
from sdxl_ambient.provenance import hash_json

DAMAGED = [
    "",
    "{",
    "[]",
    "null",
    "[" * 100_000,
    '{"settings": 1}',
    '{"settings": {}}',
    "\ud800",
    '{"a": NaN}',
    '{"a": 1, "a": 1}',
]
quick = settings(deadline=1000, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SCORES = st.dictionaries(
    st.sampled_from(["settings", "answers", "planted", "count"]),
    JSON | st.dictionaries(st.sampled_from(["train", "heldout", "copy", "a"]), JSON | st.lists(st.floats(), max_size=3)),
)


def sealed(value):
    """As ``write_sealed`` writes it, also what it would refuse to write."""
    try:
        return json.dumps({**value, "checksum": hash_json(value)})
    except (TypeError, ValueError):
        return json.dumps(value)


def write(path, text):
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


@pytest.fixture
def sets(tmp_path):
    folder = copy_emoji(tmp_path / "images", 3)
    return {key: read_folder(folder) for key in ("train", "heldout")}


def attack_json(path, answers, **settings):
    return write(path, sealed({"settings": settings, "answers": answers}))


def test_scores_are_read_again(tmp_path, sets):
    answers = {"train": {"mask": [0.5, 1, 2]}, "heldout": {"mask": [1.5, 2]}}
    found = _earlier_scores(attack_json(tmp_path / "attack.json", answers, seed=1), {"seed": 1}, sets)
    assert isinstance(found, dict) and {k: v["mask"].tolist() for k, v in found.items()} == {
        "train": [0.5, 1.0, 2.0],
        "heldout": [1.5, 2.0],
    }
    assert _earlier_scores(tmp_path / "other.json", {}, sets) is None


@pytest.mark.parametrize(
    "answers",
    [
        {"train": {"mask": [1]}},
        {"train": {"mask": [1]}, "heldout": []},
        {"train": {"mask": [1]}, "heldout": {}},
        {"train": {"mask": [1]}, "heldout": {"mask": [1, 2, 3, 4]}},  # of three images
        {"train": {"mask": [1]}, "heldout": {"noise": [1]}},
        {"train": {"mask": [1], "noise": [1, 2]}, "heldout": {"mask": [1], "noise": [1]}},
        {"train": {"mask": ["1"]}, "heldout": {"mask": [1]}},
        {"train": {"mask": [True]}, "heldout": {"mask": [1]}},
        {"train": {"mask": [10**400]}, "heldout": {"mask": [1]}},
        {"train": {"mask": [[1]]}, "heldout": {"mask": [1]}},
    ],
)
def test_damaged_scores_are_refused(tmp_path, sets, answers):
    error = _earlier_scores(attack_json(tmp_path / "attack.json", answers), {}, sets)
    assert isinstance(error, StageError) and "\n" not in str(error)
    assert str(error).startswith(str(tmp_path / "attack.json")) and str(error).endswith("; delete that file and run again")


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_json_is_named_by_each_that_reads_it(tmp_path, sets, text, capsys):
    path = write(tmp_path / "attack.json", text)
    error = _earlier_scores(path, {"seed": 1}, sets)
    assert isinstance(error, StageError) and str(path) in str(error) and "\n" not in str(error)
    assert _stored_controls(path, {"seed": 1}, ["copy"], 2) is None
    folder = tmp_path / "drawn"
    folder.mkdir()
    write(folder / MANIFEST, text)
    with pytest.raises(StageError, match=str(folder)):
        generate_images(folder, {"seed": 1}, [], lambda *_: [], 1)
    write(tmp_path / "report.json", text)
    assert report([str(tmp_path)]) == 2
    assert "has no usable report.json" in capsys.readouterr().err


@quick
@given(SCORES | JSON)
def test_any_json_is_read_or_refused(tmp_path, sets, value):
    path = write(tmp_path / "scores.json", sealed(value))
    assert isinstance(_earlier_scores(path, {}, sets), StageError | dict)
    _stored_controls(path, {}, ["copy"], 2)
    try:
        count, scores = _read_part(path, 3)
        assert 0 <= count <= 3 and all(len(v) == count and np.isfinite(v).all() for v in scores.values())
    except StageError as error:
        assert "\n" not in str(error)


def test_a_damaged_part_is_computed_anew(tmp_path, capsys):
    path, computed = tmp_path / "part.json", (2, {"mask": np.array([1, 2], np.float32)})
    for text in (None, *DAMAGED, '{"count": 9, "answers": {}}', '{"count": 2, "answers": {"mask": [1]}}'):
        if text is not None:
            write(path, text)
        assert _stored(path, 3, lambda: computed)[1] is computed[1]
        said = capsys.readouterr().out
        assert (text is None and not said) or (said.startswith(f"passed over: {path}") and "computed anew" in said)
        count, scores = _stored(path, 3, lambda: pytest.fail("it is there"))
        assert count == 2 and scores["mask"].tolist() == [1, 2]


def test_scores_that_are_not_finite_are_not_kept(tmp_path):
    _stored(tmp_path / "part.json", 1, lambda: (1, {"mask": np.array([math.nan], np.float32)}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "planted", [{"copy": [1]}, {"copy": [1, 2], "flip": [1, 2]}, {"flip": [1, 2]}, {"copy": [1, None]}, {}, 3]
)
def test_damaged_controls_are_passed_over(tmp_path, planted, capsys):
    path = write(tmp_path / "controls.json", sealed({"settings": {"a": 1}, "planted": planted}))
    assert _stored_controls(path, {"a": 1}, ["copy"], 2) is None
    assert f"passed over: {path}" in capsys.readouterr().out
    write(path, sealed({"settings": {"a": 1}, "planted": {"copy": [0.5, 1]}}))
    found = _stored_controls(path, {"a": 1}, ["copy"], 2)
    assert found is not None and found["copy"].dtype == np.float32 and found["copy"].tolist() == [0.5, 1]
    assert _stored_controls(path, {"a": 2}, ["copy"], 2) is None and not capsys.readouterr().out


HASHES = np.zeros((2, 32), np.uint8)


@pytest.mark.parametrize(
    "tensors",
    [
        {"hashes": HASHES},
        {"features": np.ones((2, 4), np.float32)},
        {"hashes": HASHES, "features": np.ones((3, 4), np.float32)},
        {"hashes": HASHES[:, :5].copy(), "features": np.ones((2, 4), np.float32)},
        {"hashes": HASHES.astype(np.int64), "features": np.ones((2, 4), np.float32)},
        {"hashes": HASHES, "features": np.ones(2, np.float32)},
        {"hashes": HASHES, "features": np.full((2, 4), np.nan, np.float32)},
    ],
)
def test_a_cache_of_other_arrays_is_refused(tmp_path, tensors):
    checksums = json.dumps({name: _checksum(name, array) for name, array in tensors.items()})
    save_file(tensors, tmp_path / "a.safetensors", metadata={"sha256": checksums})
    with pytest.raises(StageError, match=r"a\.safetensors are damaged .*; delete that file and run again"):
        FeatureCache(tmp_path).read(["00" * 32])


def test_what_is_asked_of_a_file_is_all_there(tmp_path):
    path = write(tmp_path / "a.json", sealed({"a": {"x": [1, 2]}}))
    found = read_object(path, ["a"], "do this")["a"]
    assert arrays(found, path, "do this", [2])["x"].tolist() == [1, 2]
    with pytest.raises(StageError, match=r"a\.json is damaged: it has no b; do this$"):
        read_object(path, ["a", "b"], "do this")
    with pytest.raises(StageError, match="lists of numbers are 2 to 2 long"):
        arrays(found, path, "do this", [3])
    write(path, path.read_text().replace("2", "3", 1))
    with pytest.raises(StageError, match=r"a\.json is not as it was written; do this$"):
        read_object(path, ["a"], "do this")
    write(path, '{"a": {}}')
    with pytest.raises(StageError, match=r"a\.json has no checksum, as files of earlier versions; do this$"):
        read_object(path, ["a"], "do this")


def test_one_flipped_bit_of_a_cached_embedding_is_found(tmp_path):
    digests = [f"{k:064x}" for k in range(3)]
    cache = FeatureCache(tmp_path)
    cache.add(digests, np.arange(12, dtype=np.float32).reshape(3, 4))
    assert FeatureCache(tmp_path).read(digests)[0].shape == (3, 4)
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    for place in (len(whole) - 1, len(whole) - 40, len(whole) - 60, len(whole) - 140):
        data = bytearray(whole)
        data[place] ^= 8
        path.write_bytes(data)
        with pytest.raises(StageError, match=f"the cached embeddings in {path} are damaged .*; delete that file and run"):
            FeatureCache(tmp_path).read(digests)
