"""Invariant 3, across stores: a second observation is found, and refused unless it is asked for."""

import json
import shutil

import pytest
import torch
from support.stores import equal, latents_in, snapshot

from sdxl_ambient.errors import StoreError, UserError


def test_a_second_observation_must_be_asked_for_and_is_recorded(build, emoji, tmp_path):
    store, said = tmp_path / "s", []
    build(emoji, store)
    first = latents_in(store)
    (store / "notes.txt").write_text("the user's own")
    manifest = build(emoji, store, noise_key="none", t_n=300, allow_second_observation=True, log=said.append)
    second = latents_in(store)
    assert first.keys() == second.keys() and not any(torch.equal(first[k], second[k]) for k in first)
    assert any("one more observation of the same picture" in s and "t_n: stored 500, wanted 300" in s for s in said)
    assert (store / "notes.txt").exists() and manifest["second_observation"] is True


def test_two_folders_are_one_observation(build, emoji, tmp_path):
    """The most ordinary thing to do: the same pictures with a second output folder."""
    for name in ("one/latents", "elsewhere/deep/latents"):
        build(emoji, tmp_path / name)
    assert equal(latents_in(tmp_path / "one/latents"), latents_in(tmp_path / "elsewhere/deep/latents"))


@pytest.mark.parametrize("where", ["one/latents", "far/away/down/store"])
@pytest.mark.parametrize("key", ["none", "file"])
def test_other_noise_of_the_same_pictures_is_found_wherever_it_lies(build, emoji, tmp_path, where, key):
    build(emoji, tmp_path / where)
    other = {"noise_key": "none"} if key == "none" else {"noise_key_file": str(tmp_path / "key")}
    for t_n in (500, 300):
        with pytest.raises(StoreError, match=f"6 of these images already have a noisy latent in .*{where}.*average"):
            build(emoji, tmp_path / "two/latents", t_n=t_n, **other)
        assert not list((tmp_path / "two/latents").glob("*"))
    said = []
    manifest = build(emoji, tmp_path / "two/latents", allow_second_observation=True, log=said.append, **other)
    assert any("warning" in s and "already have a noisy latent" in s for s in said) and manifest["second_observation"]
    # A clean store is no observation; nor does it protect anything.
    build(emoji, tmp_path / "clean", t_n=None, **other)
    # From here on even the kept key's path is a second observation: that of the other key exists.
    with pytest.raises(StoreError, match="already have a noisy latent in .*two/latents"):
        build(emoji, tmp_path / "three/latents")


def test_a_key_that_is_kept_nowhere_observes_once(build, emoji, tmp_path):
    build(emoji, tmp_path / "a/latents", noise_key="none")
    for key in ("none", "kept"):
        with pytest.raises(StoreError, match="already have a noisy latent in .*a/latents, made with another key"):
            build(emoji, tmp_path / "b/c/d/latents", noise_key=key)
    build(emoji, tmp_path / "a/latents", noise_key="none")  # there it may go on


def test_another_latent_of_a_picture_is_a_second_observation(build, emoji, tmp_path):
    """Another size, VAE or schedule is no point on the path, though the key is the same."""
    build(emoji, tmp_path / "a/b/s")
    with pytest.raises(StoreError, match="6 of these images .* in .*a/b/s, of another VAE, schedule, size or crop"):
        build(emoji, tmp_path / "c/d/s", resolution=32)


def test_a_copied_unfinished_store_is_no_licence_to_draw_again(build, emoji, tmp_path):
    store = tmp_path / "x" / "s"
    build(emoji, store, shard_size=2, noise_key="none")
    (store / "manifest.json").unlink()
    for name in ("latents-00001.safetensors", "latents-00002.safetensors"):
        (store / name).unlink()
    shutil.copytree(store, tmp_path / "y" / "copy")
    with pytest.raises(StoreError, match="already have a noisy latent in .*x/s"):
        build(emoji, tmp_path / "y" / "copy", shard_size=2, noise_key="none")
    shutil.rmtree(tmp_path / "y")
    store.rename(tmp_path / "moved")  # which leaves one
    build(emoji, tmp_path / "moved", shard_size=2, noise_key="none")


def test_a_neighbour_of_somebody_else_is_found_without_the_register(build, emoji, tmp_path, monkeypatch):
    build(emoji, tmp_path / "a")
    build(emoji, tmp_path / "run" / "latents", allow_second_observation=True)
    monkeypatch.setenv("SDXL_AMBIENT_HOME", str(tmp_path / "another user"))
    with pytest.raises(StoreError, match="6 of these images already have a noisy latent in .*a"):
        build(emoji, tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(StoreError, match="6 of these images already have a noisy latent in .*run/latents"):
        build(emoji, tmp_path / "b")


def test_a_lost_or_damaged_register_is_never_ignored(build, emoji, tmp_path, private_home):
    build(emoji, tmp_path / "a/b/s")
    register = private_home / "observations.sqlite"
    for damage in (lambda: register.write_bytes(b"no database" * 1000), register.unlink):
        for extra in private_home.glob("observations.sqlite-*"):
            extra.unlink()
        damage()
        with pytest.raises(UserError, match="the register of observations .* rebuild STORE"):
            build(emoji, tmp_path / "c/d/s")


def test_the_register_has_no_picture_in_it(build, emoji, tmp_path, private_home):
    manifest = build(emoji, tmp_path / "s")
    everything = b"".join(p.read_bytes() for p in private_home.iterdir() if p.is_file())
    for entry in manifest["images"]:
        assert entry["content"].encode() not in everything and bytes.fromhex(entry["content"]) not in everything
    assert str(emoji).encode() not in everything and str(tmp_path / "s").encode() in everything


def levels(emoji, *values):
    rows = [json.loads(line) for line in (emoji / "metadata.jsonl").read_text().splitlines()]
    for row, value in zip(rows, values, strict=False):
        row["level"] = value
    (emoji / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_a_picture_at_another_level_has_another_store(build, emoji, tmp_path):
    """In the same folder it is refused, since nothing that is made is lost; in another it lies on the same path."""
    store, how = tmp_path / "a", dict(t_n_column="level")
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
        build(emoji, tmp_path / f"b{value}", **how)
        shared = latents_in(tmp_path / f"b{value}")
        assert sum(torch.equal(shared[c], latents_in(store)[c]) for c in shared) == 5
    assert snapshot(store) == before


def test_pictures_that_are_stored_clean_are_no_observation(build, emoji, tmp_path):
    levels(emoji, *[-1] * 5)
    build(emoji, tmp_path / "a", t_n_column="level", noise_key="none")
    levels(emoji, *[500] * 5, -1)
    build(emoji, tmp_path / "b", t_n_column="level", noise_key="none")  # the one that is noisy in a is clean in b
    levels(emoji, *[500] * 6)
    with pytest.raises(StoreError, match="1 of these images already have a noisy latent in .*a|5 of these images .*b"):
        build(emoji, tmp_path / "c", t_n_column="level", noise_key="none")
