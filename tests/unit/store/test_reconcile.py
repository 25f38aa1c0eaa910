"""What a store refuses: a damaged plan, other settings, a second observation of its pictures (invariant 3)."""

import json

import pytest
import torch
from PIL import Image
from support.stores import latents_in, snapshot

from sdxl_ambient.errors import StoreError
from sdxl_ambient.models.load import Encoders
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.provenance import read_json, write_sealed
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.store.reconcile import compare
from sdxl_ambient.store.shards import write_mark

MARKS = {"latent": {"t_n": 500}, "text": {}}


def test_differences_are_named_but_captions_are_none():
    images = [{"content": c, "captions": ["x"], "t_n": 500} for c in "ab"]
    stored = {"fingerprint": MARKS, "images": images}
    assert compare(stored, {"fingerprint": MARKS, "images": [{**i, "captions": ["y"]} for i in images]}) == []
    wanted = {"fingerprint": {"latent": {"t_n": 300}, "text": {}}, "images": images[:1] + [{"content": "c", "t_n": 300}]}
    assert compare(stored, wanted) == ["latent.t_n: stored 500, wanted 300"]
    others = {"fingerprint": MARKS, "images": [{"content": c, "t_n": 500} for c in "xyz"]}
    assert compare(stored, others) == ["images: none of the 3 is among the 2 in the store"]


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


def test_an_earlier_format_is_refused_with_what_to_do(build, emoji, tmp_path):
    store = tmp_path / "s"
    build(emoji, store)
    for name in ("plan.json", "manifest.json"):
        value = read_json(store / name)
        value["fingerprint"]["format_version"] = 1
        write_sealed(store / name, value)
    with pytest.raises(StoreError, match="of store format 1, this version reads 2; make the store anew .* another folder"):
        build(emoji, store)


# -- sets grow ---------------------------------------------------------------------------------------------------


def drop(emoji, name):
    (emoji / name).unlink()
    rows = [r for r in (emoji / "metadata.jsonl").read_text().splitlines() if json.loads(r)["file_name"] != name]
    (emoji / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def add(emoji, name, grey):
    Image.new("RGB", (64, 64), (grey, grey, 0)).save(emoji / name)
    with open(emoji / "metadata.jsonl", "a") as file:
        file.write("\n" + json.dumps({"file_name": name, "text": f"grey {grey}"}))


@pytest.mark.parametrize("key", ["kept", "none"])
def test_added_pictures_are_drawn_and_the_rest_stays_byte_for_byte(build, emoji, tmp_path, key):
    store, said = tmp_path / "s", []
    build(emoji, store, shard_size=4, noise_key=key)
    before, files = latents_in(store), snapshot(store)
    add(emoji, "new.png", 7), add(emoji, "newer.png", 9)
    manifest = build(emoji, store, shard_size=4, noise_key=key, log=said.append)
    after = latents_in(store)
    assert len(manifest["images"]) == len(after) == 8 and all(torch.equal(after[c], before[c]) for c in before)
    assert all(snapshot(store)[n] == files[n] for n in files if n.startswith("latents-"))
    assert any("2 images are new and 0 are gone; the other 6 stay as they are" in s for s in said)
    assert not list(store.glob("*.sha256.json")) and len(LatentStore(store)) == 8


@pytest.mark.parametrize("size", [4, 1])
def test_removed_pictures_leave_the_plan_and_the_disk(build, emoji, tmp_path, size):
    store, said = tmp_path / "s", []
    build(emoji, store, shard_size=size)
    before = latents_in(store)
    drop(emoji, sorted(p.name for p in emoji.glob("*.png"))[2])
    manifest = build(emoji, store, shard_size=size, log=said.append)
    after = latents_in(store)
    assert len(after) == 5 == len(manifest["images"]) and all(torch.equal(after[c], before[c]) for c in after)
    assert any("0 images are new and 1 are gone" in s for s in said)
    (gone,) = before.keys() - after.keys()
    assert not any(gone.encode() in data for data in snapshot(store).values())
    LatentStore(store).verify()


def test_a_changed_picture_is_one_less_and_one_more(build, emoji, tmp_path):
    build(emoji, tmp_path / "s")
    before = latents_in(tmp_path / "s")
    Image.new("RGB", (64, 64), (3, 4, 5)).save(sorted(emoji.glob("*.png"))[0])
    build(emoji, tmp_path / "s")
    after = latents_in(tmp_path / "s")
    assert len(before.keys() & after.keys()) == 5 and all(torch.equal(after[c], before[c]) for c in before.keys() & after)


def test_growing_goes_on_after_an_interruption(build, emoji, tmp_path, monkeypatch):
    store = tmp_path / "s"
    build(emoji, store, shard_size=1)
    before = latents_in(store)
    drop(emoji, sorted(p.name for p in emoji.glob("*.png"))[0])
    add(emoji, "new.png", 7), add(emoji, "newer.png", 9)

    def stop(count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(emoji, store, shard_size=1, check=stop)
    with pytest.raises(StoreError, match="not a finished store"):
        LatentStore(store)
    assert len(build(emoji, store, shard_size=1)["images"]) == 7
    after = latents_in(store)
    assert len(after) == 7 and all(torch.equal(after[c], before[c]) for c in before.keys() & after)


def test_a_store_of_other_pictures_is_refused(build, emoji, tmp_path):
    build(emoji, tmp_path / "s")
    before = snapshot(tmp_path / "s")
    for name in [p.name for p in emoji.glob("*.png")]:
        drop(emoji, name)
    add(emoji, "new.png", 7)
    with pytest.raises(StoreError, match="images: none of the 1 is among the 6 in the store"):
        build(emoji, tmp_path / "s")
    assert snapshot(tmp_path / "s") == before


@pytest.mark.parametrize(("first", "then"), [("none", "kept"), ("kept", "none")])
def test_one_store_has_one_key(build, emoji, tmp_path, first, then):
    build(emoji, tmp_path / "s", noise_key=first)
    build(emoji, tmp_path / "s", noise_key=then)  # nothing is drawn
    add(emoji, "new.png", 7)
    with pytest.raises(StoreError, match="was made with (a key that is kept nowhere; go on with --noise_key none|another)"):
        build(emoji, tmp_path / "s", noise_key=then)


@pytest.mark.parametrize("key", ["none", "kept"])
@pytest.mark.parametrize("place", ["before the rows", "after the rows"])
def test_a_run_killed_about_the_register_goes_on(build, emoji, tmp_path, monkeypatch, key, place):
    """Nothing was drawn yet, so the same command draws, also with a key that is kept nowhere."""
    from sdxl_ambient.store import reconcile, register

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if place == "before the rows":
            write = reconcile._write
            patch.setattr(reconcile, "_write", lambda *arguments: killed(write(*arguments)))
        else:
            patch.setattr("sdxl_ambient.store.build.remove_dropped", killed)
        build(emoji, tmp_path / "s", noise_key=key)
    assert {p.name for p in (tmp_path / "s").iterdir()} == {".lock", "plan.json"}
    with register.open_register() as known:
        assert (known.pictures(None) > 0) == (place == "after the rows")
    build(emoji, tmp_path / "s", noise_key=key)
    assert len(latents_in(tmp_path / "s")) == 6
    with register.open_register() as known:
        assert len(known.stores()) == 1 and known.pictures(None) == 6


# -- lost and damaged shards ----------------------------------------------------------------------------------------


def test_a_lost_shard_is_drawn_again_with_the_same_noise(build, emoji, tmp_path):
    store, said = tmp_path / "s", []
    build(emoji, store, shard_size=2)
    before = snapshot(store)
    (store / "latents-00001.safetensors").unlink()
    with pytest.raises(StoreError, match="latents-00001.safetensors is damaged"):
        LatentStore(store).verify()
    build(emoji, store, shard_size=2, log=said.append)
    assert snapshot(store) == before
    assert any("1 shards of" in s and "made again, with the same noise: latents-00001" in s for s in said)


@pytest.mark.parametrize("finished", [True, False])
def test_a_lost_shard_without_its_key_is_refused(build, emoji, tmp_path, finished):
    store = tmp_path / "s"
    build(emoji, store, shard_size=2, noise_key="none")
    if not finished:  # as an interrupted run leaves it
        for name, hashes in read_json(store / "manifest.json")["sha256"].items():
            if name.startswith("latents-"):
                write_mark(store / name, hashes)
        (store / "manifest.json").unlink()
    (store / "latents-00001.safetensors").unlink()
    for key in ("none", "kept"):
        with pytest.raises(StoreError, match="latents-00001.safetensors is missing, .* a second observation"):
            build(emoji, store, shard_size=2, noise_key=key)


@pytest.mark.parametrize("pattern", ["latents-00001*", "prompts-*"])
def test_one_flipped_bit_is_found(build, emoji, tmp_path, pattern):
    store = tmp_path / "s"
    build(emoji, store, shard_size=2)
    want = LatentStore(store)
    want.verify()
    path = next(store.glob(pattern))
    data = bytearray(path.read_bytes())
    for place in (9, len(data) // 2, len(data) - 1):
        data[place] ^= 4
        path.write_bytes(data)
        with pytest.raises(StoreError, match=f"{path.name} is damaged"):
            LatentStore(store).verify()
        with pytest.raises(StoreError, match=f"{path.name} is damaged"):
            unverified = LatentStore(store)
            [unverified[0, k] for k in range(6)]
        if pattern.startswith("latents"):
            with pytest.raises(StoreError, match=f"{path.name} is damaged"):
                build(emoji, store, shard_size=2)
        data[place] ^= 4
    said = []
    data[-1] ^= 4
    path.write_bytes(data)
    if pattern.startswith("prompts"):  # which draws nothing
        build(emoji, store, shard_size=2, log=said.append)
        assert any("its captions are embedded again" in s for s in said)
        LatentStore(store).verify()


def test_an_edited_manifest_is_found(build, emoji, tmp_path):
    store = tmp_path / "s"
    build(emoji, store)
    text = (store / "manifest.json").read_text()
    (store / "manifest.json").write_text(text.replace('"t_n": 500', '"t_n": 300'))
    with pytest.raises(StoreError, match="manifest.json is damaged: it is not as it was written"):
        LatentStore(store)
    value = json.loads(text)
    value["images"][0]["t_n"] = 300
    write_sealed(store / "manifest.json", value)
    with pytest.raises(StoreError, match="manifest.json and plan.json disagree on images"):
        LatentStore(store)
