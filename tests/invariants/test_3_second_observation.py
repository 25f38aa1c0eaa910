"""Invariant 3, across stores: a second observation is found, and refused unless it is asked for."""

import json

import pytest
import torch
from support.stores import equal, latents_in, snapshot

from sdxl_ambient.errors import StoreError


def test_a_second_observation_must_be_asked_for_and_is_warned_of(build, emoji, tmp_path):
    store, said = tmp_path / "s", []
    build(emoji, store)
    first = latents_in(store)
    (store / "notes.txt").write_text("the user's own")
    build(emoji, store, t_n=300, allow_second_observation=True, log=said.append)
    second = latents_in(store)
    assert first.keys() == second.keys() and not any(torch.equal(first[k], second[k]) for k in first)
    assert any("one more observation of the same picture" in s and "t_n: stored 500, wanted 300" in s for s in said)
    assert (store / "notes.txt").exists()


def test_another_store_of_the_same_pictures_nearby_is_found(build, emoji, tmp_path):
    build(emoji, tmp_path / "one")
    for t_n in (500, 300):
        with pytest.raises(StoreError, match="6 of these images already have a noisy latent in .*one.*average"):
            build(emoji, tmp_path / "two", t_n=t_n)
        assert not (tmp_path / "two").exists() or not any((tmp_path / "two").iterdir())
    said = []
    build(emoji, tmp_path / "two", allow_second_observation=True, log=said.append)
    assert any("warning" in s and "already have a noisy latent" in s for s in said)
    # A clean store is no observation; nor does it protect anything.
    build(emoji, tmp_path / "clean", t_n=None)


def test_a_rebuild_with_the_same_key_is_no_second_observation(build, emoji, tmp_path):
    for name in ("one", "two"):
        build(emoji, tmp_path / name, noise_key_file=tmp_path / "key")
    assert equal(latents_in(tmp_path / "one"), latents_in(tmp_path / "two"))


def test_a_key_beside_a_store_of_other_noise_is_a_second_observation(build, emoji, tmp_path):
    """The same settings are the same noise only under the same key, and every neighbour counts, not the first alone."""
    build(emoji, tmp_path / "a", noise_key_file=str(tmp_path / "key"))
    build(emoji, tmp_path / "b", noise_key_file=str(tmp_path / "key"))  # a rebuild
    with pytest.raises(StoreError, match="already have a noisy latent in .*a"):
        build(emoji, tmp_path / "c", noise_key_file=str(tmp_path / "other_key"))
    build(emoji, tmp_path / "d", allow_second_observation=True)  # random noise
    with pytest.raises(StoreError, match="already have a noisy latent in .*d"):
        build(emoji, tmp_path / "e", noise_key_file=str(tmp_path / "key"))


def test_a_store_finished_under_another_key_is_nobodys_rebuild(build, emoji, tmp_path):
    build(emoji, tmp_path / "a", noise_key_file=str(tmp_path / "key"))
    build(emoji, tmp_path / "a")  # agrees, and might have drawn what was missing with a random key
    with pytest.raises(StoreError, match="already have a noisy latent"):
        build(emoji, tmp_path / "b", noise_key_file=str(tmp_path / "key"))


def levels(emoji, *values):
    rows = [json.loads(line) for line in (emoji / "metadata.jsonl").read_text().splitlines()]
    for row, value in zip(rows, values, strict=False):
        row["level"] = value
    (emoji / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_a_picture_at_another_level_is_another_observation(build, emoji, tmp_path):
    """In the same store, and in one beside it, under the same key too."""
    store, how = tmp_path / "a", dict(t_n_column="level", noise_key_file=str(tmp_path / "key"))
    levels(emoji, 300)
    build(emoji, store, **how)
    before = snapshot(store)
    build(emoji, tmp_path / "same", **how)  # a rebuild
    assert equal(latents_in(store), latents_in(tmp_path / "same"))
    for value in (301, None):
        levels(emoji, value)
        wanted = 500 if value is None else value
        message = f"noise levels: 1 images have another t_n, the first: stored 300, wanted {wanted}"
        with pytest.raises(StoreError, match=message):
            build(emoji, store, **how)
        with pytest.raises(StoreError, match="6 of these images already have a noisy latent in .*a"):
            build(emoji, tmp_path / "b", **how)
    assert snapshot(store) == before and not list(tmp_path.glob("b/*"))


def test_pictures_that_are_stored_clean_are_no_observation(build, emoji, tmp_path):
    levels(emoji, *[-1] * 5)
    build(emoji, tmp_path / "a", t_n_column="level")
    levels(emoji, *[500] * 5, -1)
    build(emoji, tmp_path / "b", t_n_column="level")  # the one that is noisy in a is clean in b
    levels(emoji, *[500] * 6)
    with pytest.raises(StoreError, match="1 of these images already have a noisy latent in .*a|5 of these images .*b"):
        build(emoji, tmp_path / "c", t_n_column="level")
