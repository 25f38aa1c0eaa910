"""What a plan and a folder hold: observations, or samples that a model restored from some."""

import pytest

from sdxl_ambient.errors import StoreError
from sdxl_ambient.provenance import write_json
from sdxl_ambient.store.lineage import (
    first_observations,
    format_levels,
    is_store,
    lineage_of,
    lowered,
    observed_levels,
    public_lineage,
    refuse_restored,
    restored_levels,
)

OBSERVED = {"fingerprint": {"latent": {"t_n": 500}}, "images": [{"content": "a", "t_n": 500}, {"content": "b", "t_n": None}]}
ROUND = {"t_n": 300, "parent": "first", "foreign_model": False, "key_id": "secret"}
RESTORED = {
    **OBSERVED,
    "images": [{"content": "a", "t_n": 300, "observed_t_n": 500}, {"content": "b", "t_n": None, "observed_t_n": None}],
    "restored": [ROUND],
}


def test_a_lineage_is_empty_for_observations():
    assert lineage_of(OBSERVED) == [] == lineage_of({**OBSERVED, "restored": None})
    assert lineage_of(RESTORED) == [ROUND]
    assert observed_levels(OBSERVED) == observed_levels(RESTORED) == {"a": 500, "b": None}


def test_shared_artefacts_have_no_id_of_the_key():
    assert public_lineage([ROUND]) == [{"t_n": 300, "parent": "first", "foreign_model": False}]
    assert ROUND["key_id"] == "secret"


def test_the_first_parent_holds_the_observations():
    assert first_observations([], "own") == "own" and first_observations([], None) is None
    assert first_observations([ROUND, {**ROUND, "parent": "second"}], "own") == "first"


def test_an_image_is_restored_to_a_lower_level_alone():
    assert [lowered({"t_n": t}, 300) for t in (None, 0, 300, 301)] == [False, False, False, True]


def test_levels_are_named_from_the_lowest():
    assert format_levels([500, None, 500]) == "none, 500"
    assert format_levels(range(100, 150, 10)) == "100 to 140 (5 levels)"


@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_a_folder_is_known_by_either_of_its_files(tmp_path, name):
    assert not is_store(tmp_path) and restored_levels(tmp_path) is None
    write_json(tmp_path / name, OBSERVED)
    assert is_store(tmp_path) and restored_levels(tmp_path) is None
    refuse_restored("train_data_dir", tmp_path)
    write_json(tmp_path / name, RESTORED)
    assert is_store(tmp_path) and restored_levels(tmp_path) == {"a": 500, "b": None}
    with pytest.raises(StoreError, match="--train_data_dir: .* restored samples.* at t_n = none, 500"):
        refuse_restored("train_data_dir", tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"fingerprint": 1}'])
def test_files_of_something_else_are_no_store(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    assert not is_store(tmp_path) and restored_levels(tmp_path) is None
