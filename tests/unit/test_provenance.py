"""Hashes, atomic writes, and differences by name."""

import json
import math

import pytest
import torch

from sdxl_ambient import provenance as manifest


def test_hashes_follow_content_only(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert manifest.hash_file(tmp_path / "a") == manifest.hash_bytes(b"x" * 3_000_000)
    assert manifest.hash_json({"a": 1, "b": [2]}) == manifest.hash_json({"b": [2], "a": 1})
    assert manifest.hash_json({"a": 1}) != manifest.hash_json({"a": 2})


def test_tensor_hashes_see_names_dtypes_shapes_and_bytes():
    a, b = torch.arange(6.0), torch.ones(2, dtype=torch.bfloat16)
    want = manifest.hash_tensors({"a": a, "b": b})
    assert manifest.hash_tensors({"b": b, "a": a}) == want
    assert manifest.hash_tensors({"a": torch.arange(12.0)[::2] / 2, "b": b}) == want  # not contiguous
    for other in ({"a": a, "c": b}, {"a": a.double(), "b": b}, {"a": a.reshape(2, 3), "b": b}, {"a": a + 1e-6, "b": b}):
        assert manifest.hash_tensors(other) != want
    assert manifest.hash_tensors({"s": torch.tensor(1)})  # a scalar, as batch norms have


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with manifest.atomic(path) as temporary:
        temporary.write_text("old")
        assert temporary.suffix == ".txt" and not path.exists()
    with pytest.raises(RuntimeError), manifest.atomic(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_that_others_can_not_read_is_refused(tmp_path, value):
    with pytest.raises(ValueError):
        manifest.write_json(tmp_path / "a.json", {"x": value})
    assert not list(tmp_path.iterdir())


def test_json_round_trip_and_damage(tmp_path):
    manifest.write_json(tmp_path / "a.json", {"é": [1, None]})
    assert manifest.read_json(tmp_path / "a.json") == {"é": [1, None]}
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="a.json is not valid JSON"):
        manifest.read_json(tmp_path / "a.json")


def test_differences_name_every_leaf():
    stored = {"a": {"t_n": 500, "same": 1}, "gone": 2}
    wanted = {"a": {"t_n": 300, "same": 1}, "new": 3}
    assert manifest.differences(stored, wanted) == [
        "a.t_n: stored 500, wanted 300",
        "gone: stored 2, wanted None",
        "new: stored None, wanted 3",
    ]
    assert manifest.differences(stored, stored) == []


def test_environment_says_what_a_result_was_made_with():
    found = manifest.environment()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["threads"] >= 1 and found["processor"] and found["sdxl_ambient"]
    json.dumps(found, allow_nan=False)
