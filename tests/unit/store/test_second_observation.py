"""What a store refuses: a damaged plan, other settings, a second observation of its pictures (invariant 3)."""

import json

import pytest
import torch
from PIL import Image
from support.stores import snapshot

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


# -- noise levels of their own -----------------------------------------------------------------------------------
