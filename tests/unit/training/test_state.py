"""A run's state without pickles: trees come back bit for bit, and nothing else is stored."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.running import assert_identical

from sdxl_ambient.errors import CheckpointError
from sdxl_ambient.training.state import load_tree, random_state, save_tree, set_random_state

TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=1000, derandomize=True, database=None)
@given(TREES)
def test_every_tree_comes_back(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "t.safetensors"
    save_tree(path, tree)
    assert_identical(load_tree(path), tree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int8,
                                   torch.int64, torch.bool])  # fmt: skip
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    values = torch.randn(3, 4).mul(50).abs().to(dtype)
    whole = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tree = {"a": {0: values, 1: values[0, 0]}, "b": [whole.T, whole[:, 1], torch.zeros(0)], "c": whole}
    save_tree(tmp_path / "t", tree)
    found = load_tree(tmp_path / "t")
    assert_identical(found, tree)
    assert found["a"][0].dtype == dtype and found["a"][1].shape == ()


def test_numbers_that_are_none_come_back(tmp_path):
    save_tree(tmp_path / "t", {"x": [math.inf, -math.inf, math.nan, np.float32(0.1), np.int64(3)]})
    x = load_tree(tmp_path / "t")["x"]
    assert x[:2] == [math.inf, -math.inf] and math.isnan(x[2]) and x[3:] == [float(np.float32(0.1)), 3]


@pytest.mark.parametrize("value", [object(), {1.5: 2}, {(1, 2): 3}, {1, 2}, b"bytes", 1j, lambda: 0, torch.float32])
def test_what_would_have_to_be_pickled_is_refused_when_it_is_saved(tmp_path, value):
    with pytest.raises(TypeError, match="can't be stored without a pickle"):
        save_tree(tmp_path / "t", {"a": value})
    assert not (tmp_path / "t").exists()


DAMAGED = ["", "{", "[]", '{"x": 1, "y": 2}', '{"tensor": "7"}', '{"call": []}', '{"dict": [[1.5, 2]]}', '{"dict": 3}',
           '{"number": "1"}', "[" * 100_000]  # fmt: skip


@pytest.mark.parametrize("tree", DAMAGED)
def test_a_damaged_tree_is_one_line(tmp_path, tree):
    save_file({}, str(tmp_path / "t"), metadata={"tree": tree})
    if tree == "[]":
        assert load_tree(tmp_path / "t") == []  # as JSON has it; no tree of ours
        return
    with pytest.raises(CheckpointError, match="t is damaged or of another version") as error:
        load_tree(tmp_path / "t")
    assert "\n" not in str(error.value)


def test_generators_go_on_where_they_were(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.normal(), random.gauss(0, 1)
    save_tree(tmp_path / "r", random_state())

    def draws():
        return [random.random(), random.gauss(0, 1), np.random.normal(), torch.randn(2).tolist()]

    want = draws()
    set_random_state(load_tree(tmp_path / "r"))
    assert draws() == want
