"""A finished store as a data set: how its pictures are shown, what names it, and what is said of a damaged one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from support.pictures import copy_emoji

from sdxl_ambient.errors import StoreError
from sdxl_ambient.images.geometry import mirrored
from sdxl_ambient.levels import CLEAN
from sdxl_ambient.models.denoiser import Denoiser
from sdxl_ambient.posterior import sample_posterior
from sdxl_ambient.provenance import read_sealed, write_sealed
from sdxl_ambient.randomness import Randomness
from sdxl_ambient.store.batches import Stream, collate, loader
from sdxl_ambient.store.reader import EMPTY, LatentStore, Presentation
from sdxl_ambient.training.posterior_buffer import PosteriorBuffer, RestoreOptions


def test_a_store_knows_its_sizes(bucketed, store):
    data = LatentStore(bucketed)
    assert {size: len(members) for size, members in data.groups.items()} == {(48, 80): 2, (64, 64): 4, (80, 48): 1}
    assert sorted(sum(data.groups.values(), [])) == list(range(7))
    seen = set()
    stream = Stream(len(data), 3, seed=0, stop=14, groups=data.groups.values())
    for batch in loader(data, stream):
        size = tuple(4 * side for side in batch.x_n.shape[2:])  # the miniature's VAE has a factor of 4
        assert (batch.conditioning.time_ids[:, 4:] == torch.tensor(size)).all()
        seen.add(size)
    assert seen == set(data.groups)
    assert list(LatentStore(store).groups) == [(64, 64)] and len(LatentStore(bucketed, limit=2).groups) <= 2


# -- how pictures are shown ---------------------------------------------------------------------------------------


def test_captions_are_drawn_among_a_pictures_own(store):
    """The picture with two captions shows both, about equally often, and the same at every reading."""
    data = LatentStore(store)
    (index,) = [i for i, entry in enumerate(data.images) if len(entry["captions"]) == 2]
    files = {k: v for p in store.glob("prompts-*") for k, v in load(p.read_bytes()).items()}
    first = files[f"{data.images[index]['captions'][0]}.embeds"]
    shown = [torch.equal(data[p, index]["embeds"], first) for p in range(200)]
    assert 70 < sum(shown) < 130 and shown != [p % 2 == 0 for p in range(200)]
    assert [torch.equal(LatentStore(store)[p, index]["embeds"], first) for p in range(0, 200, 7)] == shown[::7]
    other = LatentStore(store, presentation=Presentation(seed=1))
    assert [torch.equal(other[p, index]["embeds"], first) for p in range(200)] != shown


def test_half_are_mirrored_with_the_time_ids_of_the_mirror(bucketed):
    """Invariants 3 and 8: the stored noisy latent is mirrored, and its crop is where the mirrored picture has it."""
    plain, data = LatentStore(bucketed), LatentStore(bucketed, presentation=Presentation(random_flip=True))
    moved = 0
    for position in range(140):
        index = position % 7
        want, got = plain[position, index], data[position, index]
        assert torch.equal(got["x_n"], want["x_n"].flip(-1) if got["flipped"] else want["x_n"])
        assert got["time_ids"] == (mirrored(want["time_ids"]) if got["flipped"] else want["time_ids"])
        assert torch.equal(got["embeds"], want["embeds"]) and not got["dropped"]
        moved += got["time_ids"] != want["time_ids"]
    flipped = [data[p, 0]["flipped"] for p in range(400)]
    assert 160 < sum(flipped) < 240 and moved


@pytest.mark.parametrize("zero_empty", [True, False])
def test_a_part_is_shown_without_its_caption(bucketed, zero_empty):
    plain = LatentStore(bucketed)
    data = LatentStore(bucketed, presentation=Presentation(empty_prompts=0.3, zero_empty=zero_empty))
    files = {k: v for p in bucketed.glob("*.safetensors") for k, v in load(p.read_bytes()).items()}
    empty = [files[f"{EMPTY}.{name}"] for name in ("embeds", "pooled")]
    empty = [torch.zeros_like(x) for x in empty] if zero_empty else empty
    for position in range(30):
        want, got = plain[position, 0], data[position, 0]
        embeds, pooled = empty if got["dropped"] else (want["embeds"], want["pooled"])
        assert torch.equal(got["embeds"], embeds) and torch.equal(got["pooled"], pooled)
        assert torch.equal(got["x_n"], want["x_n"]) and got["time_ids"] == want["time_ids"]
        assert torch.equal(got["tokens"], files[f"{EMPTY}.tokens"] if got["dropped"] else want["tokens"])
    assert 0.2 < sum(data[p, 0]["dropped"] for p in range(400)) / 400 < 0.4


def test_showing_is_the_same_whoever_reads(bucketed):
    """Independent of workers, processes and resumes, and of what else is drawn for a step."""
    data = LatentStore(bucketed, presentation=Presentation(random_flip=True, empty_prompts=0.4))
    how = dict(seed=0, stop=8, groups=data.groups.values())
    whole = list(loader(data, Stream(7, 4, **how)))
    worked = list(loader(data, Stream(7, 4, **how), workers=2))
    tail = list(loader(data, Stream(7, 4, start=3, **how)))
    ranks = [list(loader(data, Stream(7, 2, rank_and_size=(r, 2), **how))) for r in range(2)]
    for step, batch in enumerate(whole):
        assert batch.flipped.dtype == batch.dropped.dtype == torch.bool
        for other in (worked[step], *([tail[step - 3]] if step >= 3 else [])):
            assert torch.equal(other.x_n, batch.x_n) and torch.equal(other.dropped, batch.dropped)
            for name in ("prompt_embeds", "pooled", "time_ids"):
                assert torch.equal(getattr(other.conditioning, name), getattr(batch.conditioning, name))
            for name in ("t_n", "tokens", "flipped"):
                assert torch.equal(getattr(other, name), getattr(batch, name))
            assert other.positions == batch.positions and other.contents == batch.contents
        parts = [r[step] for r in ranks]
        assert torch.equal(torch.cat([p.x_n for p in parts]), batch.x_n)
        assert torch.equal(torch.cat([p.dropped for p in parts]), batch.dropped)
    flipped, dropped = (torch.cat([getattr(b, name) for b in whole]) for name in ("flipped", "dropped"))
    assert flipped.any() and dropped.any() and not torch.equal(flipped, dropped)


def test_by_default_nothing_is_drawn(bucketed, monkeypatch):
    data = LatentStore(bucketed)
    monkeypatch.setattr("sdxl_ambient.store.reader.sample_generator", None)
    batch = collate([data[p, 0] for p in range(3)])
    assert not batch.dropped.any() and not batch.flipped.any()


def test_a_store_without_the_empty_prompt_is_refused_where_it_is_needed(copied):
    manifest = read_sealed(copied / "manifest.json")
    del manifest["prompts"][EMPTY]
    write_sealed(copied / "manifest.json", manifest)
    LatentStore(copied)
    assert LatentStore(copied, presentation=Presentation(empty_prompts=1.0))[0, 0]["embeds"].abs().max() == 0
    with pytest.raises(StoreError, match="was made by an earlier version, without the empty prompt; run again with the im"):
        LatentStore(copied, presentation=Presentation(empty_prompts=0.1, zero_empty=False))


def test_few_shards_are_open_at_a_time(store, monkeypatch):
    """A store of thousands of shards must not need thousands of open files."""
    want = LatentStore(store)[0, 0]["x_n"]
    monkeypatch.setattr("sdxl_ambient.store.reader.MAXIMUM_OPEN", 2)
    data = LatentStore(store)
    for position in range(12):
        data[position, position % 6]
        assert len(data._open) <= 2
    kept = data[0, 0]["x_n"]  # stays readable when its shard is closed
    data[0, 2], data[0, 4]
    assert torch.equal(kept, want) and Path(store / "manifest.json").exists()


def test_restored_samples_are_shown_as_their_images_are(store, unet, schedule):
    """A sample that is drawn from a mirrored latent is the mirror's; it is kept as the image is stored."""
    data = LatentStore(store, presentation=Presentation(random_flip=True))
    restoration = PosteriorBuffer(data, RestoreOptions(batch_size=3, refresh=1, steps=2, levels="low"), seed=0)
    ways = {}
    for batch in restoration.batches(0, 4):
        drawn, denoise = restoration.generators(batch), Denoiser(unet, batch.conditioning)
        x_0 = restoration.restored(batch, denoise, schedule, drawn).x_0
        restoration.commit()
        # The first is drawn anew in every batch: from what is shown, not from its mirror image.
        again = Randomness(restoration.generators(batch)[:1], 1)
        want = sample_posterior(denoise.rows([0]), schedule, batch.x_n[:1], batch.t_n[:1], 2, again)
        assert torch.allclose(x_0[:1], want, atol=1e-5)
        for row, content in enumerate(batch.contents):
            flipped = bool(batch.flipped[row])
            ways.setdefault(content, set()).add(flipped)
            kept = restoration.samples[content]
            assert torch.equal(x_0[row], kept.flip(-1) if flipped else kept)
    assert any(len(seen) == 2 for seen in ways.values())


def test_restoring_needs_pictures_of_one_size(bucketed):
    with pytest.raises(StoreError, match="restore needs images of one size"):
        PosteriorBuffer(LatentStore(bucketed), RestoreOptions(batch_size=3, refresh=1, steps=2, levels="low"), seed=0)


def test_a_picture_is_the_same_in_every_epoch(store):
    """Invariant 3 where training reads: no new noise from one epoch to the next."""
    data, seen = LatentStore(store), {}
    stream = Stream(len(data), 3, seed=0, stop=8)
    for items, batch in zip(stream, loader(data, stream), strict=True):
        for (_, index), x_n in zip(items, batch.x_n, strict=True):
            assert torch.equal(seen.setdefault(index, x_n.clone()), x_n)
    assert len(seen) == 6


def test_clean_and_mixed_stores_have_a_level_per_sample(copied):
    for name in ("plan.json", "manifest.json"):
        value = read_sealed(copied / name)
        value["images"][0]["t_n"], value["images"][1]["t_n"] = None, 0
        write_sealed(copied / name, value)
    data = LatentStore(copied)
    assert [data[(0, i)]["t_n"] for i in range(3)] == [CLEAN, 0, 500]


def test_a_limit_takes_the_first_pictures(store):
    assert len(LatentStore(store, limit=2)) == 2 and len(LatentStore(store, limit=100)) == 6
    assert LatentStore(store, limit=2).images == LatentStore(store).images[:2]


def test_the_hash_names_the_store_not_the_noise(store, copied, build, tmp_path):
    assert LatentStore(store).hash == LatentStore(copied).hash
    images = copy_emoji(tmp_path / "images", 6)
    for name in ("one", "two"):
        build(images, tmp_path / name / "s")
        assert LatentStore(tmp_path / name / "s").hash == LatentStore(store).hash
    build(images, tmp_path / "three" / "s", t_n=300)
    assert LatentStore(tmp_path / "three" / "s").hash != LatentStore(store).hash


# -- damage -------------------------------------------------------------------------------------------------------


def test_an_unfinished_store_is_refused(copied, tmp_path):
    (copied / "manifest.json").unlink()
    for folder in (copied, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match="not a finished store of latents: it has no manifest.json"):
            LatentStore(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_manifest_is_refused(copied, text):
    (copied / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match="manifest.json is damaged"):
        LatentStore(copied)


@pytest.mark.parametrize("kind", ["latents", "prompts"])
@pytest.mark.parametrize("how", ["truncated", "missing", "other"])
def test_a_damaged_shard_is_named(copied, kind, how):
    path = sorted(copied.glob(f"{kind}-*.safetensors"))[0]
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(sorted(copied.glob("latents-*.safetensors"))[-1].read_bytes())
    data = LatentStore(copied)
    with pytest.raises(StoreError, match=f"{path.name} is damaged") as error:
        for i in range(6):
            data[(0, i)]
    assert "\n" not in str(error.value)
