"""The order of samples follows from the seed alone, whatever the processes, workers or interruptions."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load
from support.pictures import copy_emoji

from sdxl_ambient.errors import StoreError
from sdxl_ambient.images.geometry import Geometry, mirrored
from sdxl_ambient.levels import CLEAN
from sdxl_ambient.models.denoiser import Denoiser
from sdxl_ambient.posterior import sample_posterior
from sdxl_ambient.randomness import Randomness, sample_generator
from sdxl_ambient.store.batches import Batch, Stream, collate, loader, small_groups
from sdxl_ambient.store.build import build_store
from sdxl_ambient.store.checks import check_stores, common_t_n, format_store_levels
from sdxl_ambient.store.reader import EMPTY, LatentStore, Presentation
from sdxl_ambient.store.settings import StoreSettings
from sdxl_ambient.training.posterior_buffer import PosteriorBuffer
from sdxl_ambient.training.settings import RestoreOptions


def positions(stream) -> list[tuple[int, int]]:
    return [item for batch in stream for item in batch]


@pytest.fixture(scope="module")
def store(tmp_path_factory, encoders, schedule):
    """A store of six emoji, two to a shard; one of them twice, with another caption."""
    folder = tmp_path_factory.mktemp("data")
    images = copy_emoji(folder / "images", 6)
    first = sorted(images.glob("*.png"))[0]
    (images / "copy.png").write_bytes(first.read_bytes())
    (images / "copy.txt").write_text("another caption of the same picture")
    build_store(
        images, folder / "store", encoders, schedule, StoreSettings(Geometry(64), shard_size=2), state=PartialState(),
        log=lambda message: None,
    )  # fmt: skip
    return folder / "store"


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory, encoders, schedule, photographs):
    """Three photographs, lying and upright, and four square emoji, in three sizes; the store has tokens."""
    folder = tmp_path_factory.mktemp("bucketed")
    images = copy_emoji(folder / "images", 4)
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    for path in sorted(photographs.iterdir()):
        shutil.copy(path, images)
        if path.suffix != ".txt":
            rows.append({"file_name": path.name, "text": f"a photograph, {path.stem}"})
    (images / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    geometry = Geometry(64, False, ((48, 80), (64, 64), (80, 48)))
    build_store(
        images, folder / "store", encoders, schedule, StoreSettings(geometry, keep_tokens=True), state=PartialState(),
        log=lambda message: None,
    )  # fmt: skip
    return folder / "store"


@pytest.fixture
def copied(store, tmp_path):
    return shutil.copytree(store, tmp_path / "store")


# -- order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 12])
def test_every_epoch_is_a_permutation_and_epochs_differ(size):
    items = positions(Stream(size, 4, seed=0, stop=3 * size))
    assert [p for p, _ in items] == list(range(12 * size))
    orders = [[i for _, i in items[e * size : (e + 1) * size]] for e in range(12)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert size == 1 or len({tuple(o) for o in orders}) > 1
    assert size < 7 or [i for _, i in items] != [i for _, i in positions(Stream(size, 4, seed=1, stop=3 * size))]


def test_the_global_order_is_the_same_for_any_processes_and_batch():
    """One process with four, two with two, four with one: the same samples in every step."""
    want = list(Stream(7, 4, seed=3, stop=10))
    for processes, batch in ((2, 2), (4, 1)):
        ranks = [list(Stream(7, batch, seed=3, stop=10, rank_and_size=(r, processes))) for r in range(processes)]
        assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == want
        assert all(len(r) == 10 for r in ranks)


def test_a_resumed_stream_is_the_tail_of_the_whole():
    whole = list(Stream(7, 3, seed=5, stop=20))
    for start in (0, 1, 9, 19, 20):
        tail = Stream(7, 3, seed=5, start=start, stop=20)
        assert list(tail) == whole[start:] and len(tail) == 20 - start


def test_the_order_is_that_of_the_first_runs():
    """What a run of one size sees is frozen: a checkpoint of an earlier version goes on with the same data."""
    stream = Stream(7, 3, seed=5, stop=6)
    assert [i for _, i in positions(stream)] == [0, 3, 1, 4, 5, 6, 2, 2, 1, 5, 4, 0, 3, 6, 3, 4, 6, 1]
    mine = Stream(7, 3, seed=5, stop=4, groups=[range(3, 17, 2)], purpose="restore 3 of 4")
    assert [i for _, i in positions(mine)] == [3, 11, 13, 9, 7, 5, 15, 3, 5, 13, 11, 7]


def test_every_sample_has_its_own_generator():
    def draws(seed, *positions):
        no = torch.zeros(len(positions), dtype=torch.bool)
        batch = Batch(torch.zeros(1), torch.zeros(1), None, list(positions), [], no, no)
        return [torch.randn(3, generator=g).tolist() for g in batch.generators(seed)]

    a = draws(0, 5, 6, 7)
    assert draws(0, 7, 5) == [a[2], a[0]] and len({tuple(x) for x in a + draws(1, 5, 6, 7)}) == 6
    assert sample_generator(0, "train", 5).initial_seed() != sample_generator(0, "heldout", 5).initial_seed()
    values = torch.tensor([torch.randn((), generator=sample_generator(0, "train", i)) for i in range(2000)])
    assert abs(values.mean()) < 0.08 and abs(values.std() - 1) < 0.05  # neighbouring seeds start alike otherwise


# -- pictures of several sizes --------------------------------------------------------------------------------------

GROUPS = [list(range(0, 40, 2)), list(range(1, 41, 2)) + [41], [40], [42, 43, 44, 45]]  # 20, 21, 1 and 4 pictures


def grouped(batch=4, seed=3, stop=400, **keywords) -> Stream:
    return Stream(46, batch, seed, stop=stop, groups=GROUPS, **keywords)


def group_of(batch) -> int:
    (found,) = {next(g for g, members in enumerate(GROUPS) if i in members) for _, i in batch}
    return found


def test_a_batch_is_of_one_size_and_positions_are_unique():
    batches = list(grouped())
    assert {group_of(b) for b in batches} == {0, 1, 2, 3}
    assert [p for p, _ in sum(batches, [])] == list(range(1600))


def test_the_size_of_a_batch_is_the_same_everywhere():
    """One process with four, two with two, four with one: the same samples in every step, of one size on all of them."""
    want = list(grouped(stop=60))
    for processes, batch in ((2, 2), (4, 1)):
        ranks = [list(grouped(batch, stop=60, rank_and_size=(r, processes))) for r in range(processes)]
        assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == want
        assert all(len({group_of(b) for b in parts}) == 1 for parts in zip(*ranks, strict=True))


def test_a_resumed_stream_of_several_sizes_is_the_tail_of_the_whole():
    whole = list(grouped(stop=100))
    for start in (0, 1, 11, 12, 57, 99, 100):
        assert list(grouped(start=start, stop=100)) == whole[start:]


def test_every_picture_is_shown_equally_often():
    """After every epoch of 46 pictures, each was shown as often as epochs went by, up to its group's unfinished batch."""
    batches = list(grouped(stop=46 * 25))
    shown = Counter()
    for step, batch in enumerate(batches, start=1):
        shown.update(i for _, i in batch)
        if step % 46:
            continue  # four epochs are 46 batches
        for members in GROUPS:
            counts = [shown[i] for i in members]
            assert max(counts) - min(counts) <= max(1, 4 // len(members))
            assert abs(sum(counts) - step * 4 / 46 * len(members)) < 4
    assert sum(shown.values()) == 46 * 100 and shown[40] == 100


def test_the_order_of_sizes_is_drawn_for_every_epoch():
    epochs = [[group_of(b) for b in list(grouped(stop=230))[e * 46 : (e + 1) * 46]] for e in range(5)]
    assert len({tuple(e) for e in epochs}) == 5
    assert [group_of(b) for b in grouped(stop=46, seed=4)] != epochs[0]
    # Not one size after the other: of 46 batches, 41 are of the two large groups, in about as many runs as a shuffle has.
    assert all(sum(a != b for a, b in zip(e, e[1:], strict=False)) > 15 for e in epochs)


def test_sizes_have_orders_of_their_own():
    """Two groups of equal count are not shuffled alike."""
    stream = Stream(20, 10, seed=0, stop=8, groups=[range(10), range(10, 20)])
    orders = {group: [] for group in (0, 1)}
    for batch in stream:
        orders[batch[0][1] // 10].append([i % 10 for _, i in batch])
    assert len(orders[0]) == len(orders[1]) == 4
    assert not any(order in orders[1] for order in orders[0])


def test_epochs_may_be_shorter_than_a_batch():
    """Eight pictures in batches of 100: most epochs end before a batch does."""
    groups = [[0, 1, 2], [3], [4, 5, 6, 7]]
    whole = list(Stream(8, 100, seed=0, stop=24, groups=groups))
    shown = Counter(i for batch in whole for _, i in batch)
    assert set(shown) == set(range(8)) and all(abs(n - 300) <= 100 for n in shown.values())
    assert list(Stream(8, 100, seed=0, start=17, stop=24, groups=groups)) == whole[17:]


def test_sizes_with_few_pictures_are_named():
    groups = {(64, 64): range(20), (48, 80): range(3), (80, 48): range(4)}
    (line,) = small_groups(groups, 4)
    assert line == "note: 3 pictures of 48 x 80 pixels are fewer than the 4 of a batch, which repeats them"
    assert len(small_groups(groups, 21)) == 3 and small_groups(groups, 3) == []
    assert small_groups({(64, 64): range(3)}, 4) == []  # the square alone, as ever


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


def test_batches_have_tokens_where_the_store_does(bucketed, store, encoders):
    data = LatentStore(bucketed)
    batch = collate([data[0, i] for i in data.groups[64, 64][:2]])
    assert batch.tokens.shape == (2, 2, 77) and batch.tokens.dtype == torch.int64
    assert encoders.tokenizers[0].decode(batch.tokens[0, 0], skip_special_tokens=True)
    assert batch.first(1).tokens.equal(batch.tokens[:1]) and len(batch.first(1).dropped) == len(batch.first(1).flipped) == 1
    plain = collate([LatentStore(store)[0, i] for i in range(2)])
    assert plain.tokens is None and plain.first(1).tokens is None


def test_a_store_without_the_empty_prompt_is_refused_where_it_is_needed(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest["prompts"][EMPTY]
    (copied / "manifest.json").write_text(json.dumps(manifest))
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


# -- stores of several noise levels ------------------------------------------------------------------------------------


def with_levels(store, *levels) -> LatentStore:
    data = LatentStore(store)
    data.manifest["images"] = [{**i, "t_n": t} for i, t in zip(data.manifest["images"], levels, strict=False)]
    return data


def test_levels_of_a_store_are_told(store):
    assert common_t_n(with_levels(store, None, None)) is None and format_store_levels(with_levels(store, None)) == "none"
    assert common_t_n(with_levels(store, 300)) == 300 and format_store_levels(with_levels(store, 300)) == "300"
    mixed = with_levels(store, 500, None, 0, 500)
    assert common_t_n(mixed) == "mixed" and format_store_levels(mixed) == "none, 0, 500"
    assert format_store_levels(with_levels(store, *range(100, 160, 10))) == "100 to 150 (6 levels)"


def test_heldout_images_are_at_levels_that_training_has(store, schedule):
    def check(heldout, *trained):
        return check_stores(with_levels(store, *trained), with_levels(store, *heldout), schedule)

    assert check([500], 500) == [] == check([500, None], None, 500)
    (note,) = check([500], None, 500)
    assert "is at t_n = 500, " in note and note.endswith("at none, 500; the held-out loss is that of its own levels")
    assert len(check([350, 400], 300, 500)) == 1
    for heldout, trained in (([300], [500]), ([None], [500]), ([500], [None]), ([400, 600], [300, 500])):
        with pytest.raises(StoreError, match="is at t_n = "):
            check(heldout, *trained)


def test_low_levels_need_one_noisy_picture(store, schedule):
    for low_noise in ("consistency", "restore"):
        check_stores(with_levels(store, None, 500), None, schedule, low_noise)
        with pytest.raises(StoreError, match="holds clean latents; use skip"):
            check_stores(with_levels(store, None, None), None, schedule, low_noise)


# -- what a batch holds ------------------------------------------------------------------------------------------


def test_a_batch_holds_what_the_store_holds(store):
    data = LatentStore(store)
    assert len(data) == 6
    stream = Stream(len(data), 4, seed=0, stop=4)
    files = {k: v for p in store.glob("*.safetensors") for k, v in load(p.read_bytes()).items()}
    captions = set()
    for items, batch in zip(stream, loader(data, stream), strict=True):
        assert batch.positions == [p for p, _ in items] and batch.t_n.tolist() == [500] * 4
        for row, (_, index) in enumerate(items):
            entry = data.images[index]
            (caption,) = [c for c in entry["captions"] if batch.conditioning.pooled[row].equal(files[f"{c}.pooled"])]
            captions.add(caption)
            assert torch.equal(batch.x_n[row], files[entry["content"]])
            assert torch.equal(batch.conditioning.prompt_embeds[row], files[f"{caption}.embeds"])
            assert batch.conditioning.time_ids[row].tolist() == entry["time_ids"] == [64, 64, 0, 0, 64, 64]
    assert len(captions) == 7  # the picture with two captions has shown both
    assert batch.x_n.dtype == batch.conditioning.time_ids.dtype == torch.float32


def test_a_picture_is_the_same_in_every_epoch(store):
    """Invariant 3 where training reads: no new noise from one epoch to the next."""
    data, seen = LatentStore(store), {}
    stream = Stream(len(data), 3, seed=0, stop=8)
    for items, batch in zip(stream, loader(data, stream), strict=True):
        for (_, index), x_n in zip(items, batch.x_n, strict=True):
            assert torch.equal(seen.setdefault(index, x_n.clone()), x_n)
    assert len(seen) == 6


def test_workers_give_the_same_batches(store):
    data = LatentStore(store)
    data[(0, 0)]  # an open file, which must not travel to a worker
    plain, worked = (list(loader(data, Stream(6, 4, seed=0, stop=5), workers)) for workers in (0, 2))
    assert len(plain) == len(worked) == 5
    for a, b in zip(plain, worked, strict=True):
        assert a.positions == b.positions and torch.equal(a.x_n, b.x_n)
        assert torch.equal(a.conditioning.prompt_embeds, b.conditioning.prompt_embeds)


def test_reading_draws_nothing_from_the_global_generators(store):
    data = LatentStore(store)
    state = torch.get_rng_state()
    list(loader(data, Stream(6, 4, seed=0, stop=3)))
    assert torch.equal(torch.get_rng_state(), state)


def test_clean_and_mixed_stores_have_a_level_per_sample(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["images"][0]["t_n"], manifest["images"][1]["t_n"] = None, 0
    (copied / "manifest.json").write_text(json.dumps(manifest))
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
