"""Hashes, atomic writes, and differences by name."""

import json
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_ambient import provenance as manifest
from sdxl_ambient.errors import JsonError


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


HOSTILE = {
    "deep list": (b"[" * 100_000, "nested too deeply"),
    "deep object": (b'{"a":' * 100_000, "nested too deeply"),
    "no UTF-8": (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
    "half a pair": (b'{"a": ["\\uD800"]}', "half of a surrogate pair"),
    "NaN": (b'{"a": NaN}', "NaN is no number"),
    "infinity": (b"[-Infinity]", "-Infinity is no number"),
    "too large": (b"[1e999]", "1e999 is too large a number"),
    "very long": (b"9" * 5000, "digits"),
    "twice": (b'{"b": {"a": 1, "a": 1}}', "the key 'a' twice in one object"),
    "nothing": (b"", "Expecting value"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_json_that_is_none_is_one_line_that_names_the_file(tmp_path, case):
    content, message = HOSTILE[case]
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(JsonError, match="a.json is not valid JSON: ") as error:
        manifest.read_json(tmp_path / "a.json")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_file_or_too_large_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(JsonError, match="it is no file"):
        manifest.read_json(tmp_path / "pipe")
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(JsonError, match="3 bytes, more than the 2 that are read"):
        manifest.read_json(tmp_path / "a.json", most=2)
    assert manifest.read_json(tmp_path / "a.json", most=3) == [1]


@settings(deadline=1000, derandomize=True, database=None)
@given(st.binary(max_size=40) | st.text(alphabet='[]{}",:0123456789.eE-\\ud8N', max_size=40).map(str.encode))
def test_any_bytes_are_read_or_refused(content):
    try:
        value = manifest.parse_json(content, "a")
    except JsonError as error:
        assert str(error).startswith("a is not valid JSON: ")
    else:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


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
