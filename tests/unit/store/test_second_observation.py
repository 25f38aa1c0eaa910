"""What a store refuses: a damaged plan, other settings, a second observation of its pictures (invariant 3)."""

import json

import pytest
import torch
from PIL import Image
from support.stores import equal, latents_in, snapshot

from sdxl_ambient.errors import StoreError
from sdxl_ambient.models.load import Encoders
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.store.second_observation import compare

MARKS = {"latent": {"t_n": 500}, "text": {}}


def test_differences_are_named_but_captions_are_none():
    images = [{"content": c, "captions": ["x"], "t_n": 500} for c in "ab"]
    stored = {"fingerprint": MARKS, "images": images}
    assert compare(stored, {"fingerprint": MARKS, "images": [{**i, "captions": ["y"]} for i in images]}) == []
    wanted = {"fingerprint": {"latent": {"t_n": 300}, "text": {}}, "images": images[:1] + [{"content": "c", "t_n": 300}]}
    assert compare(stored, wanted) == [
        "latent.t_n: stored 500, wanted 300",
        "images: 1 are not in the store, 1 are in the store only",
    ]


def test_a_damaged_plan_or_a_missing_one_is_refused(build, emoji, tmp_path):
    store = tmp_path / "s"
    build(emoji, store)
    plan = (store / "plan.json").read_text()
    for text in ("{", "[]", "{}"):
        (store / "plan.json").write_text(text)
        with pytest.raises(StoreError, match="plan.json is damaged"):
            build(emoji, store)
    (store / "plan.json").unlink()
    with pytest.raises(StoreError, match="holds latents but no plan.json"):
        build(emoji, store, t_n=300)
    (store / "plan.json").write_text(plan)
    build(emoji, store)


def changed(encoders, what) -> Encoders:
    import copy

    new = Encoders(copy.deepcopy(encoders.vae), encoders.tokenizers, tuple(map(copy.deepcopy, encoders.text_encoders)))
    module = {"vae": new.vae, "text": new.text_encoders[1]}[what]
    next(module.parameters()).data.add_(1e-3)
    return new


def test_a_store_of_something_else_is_refused_by_name(build, emoji, tmp_path, encoders, schedule):
    store = tmp_path / "s"
    build(emoji, store)
    before = snapshot(store)
    bars = schedule.alpha_bar(torch.arange(1000)) ** 1.01
    for message, keywords in (
        (r"latent\.t_n: stored 500, wanted 300", dict(t_n=300)),
        (r"latent\.t_n: stored 500, wanted None", dict(t_n=None)),
        (r"latent\.resolution: stored 64, wanted 32", dict(resolution=32)),
        (r"latent\.center_crop: stored True, wanted False", dict(center=False)),
        (r"latent\.vae: stored", dict(encoders=changed(encoders, "vae"))),
        (r"text\.text_encoders: stored", dict(encoders=changed(encoders, "text"))),
        (r"latent\.schedule: stored", dict(schedule=NoiseSchedule(bars))),
    ):
        with pytest.raises(StoreError, match=message) as error:
            build(emoji, store, **keywords)
        assert "\n" not in str(error.value)
        assert snapshot(store) == before
    next(emoji.glob("*.png")).unlink()
    rows = (emoji / "metadata.jsonl").read_text().splitlines()
    rows = [r for r in rows if (emoji / json.loads(r)["file_name"]).exists()]
    (emoji / "metadata.jsonl").write_text("\n".join(rows))
    Image.new("RGB", (64, 64)).save(emoji / "new.png")
    (emoji / "new.txt").write_text("black")
    with pytest.raises(StoreError, match="images: 1 are not in the store, 1 are in the store only"):
        build(emoji, store)
    assert snapshot(store) == before


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


# -- noise levels of their own -----------------------------------------------------------------------------------


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
