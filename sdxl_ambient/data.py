"""Stored shards → batches, in an order that depends on nothing but the seed.

The training data is one endless stream of samples: each epoch is a permutation of the store drawn from (seed, epoch), and
one epoch follows the other without a gap. Micro-step k of a run takes the next ``batch × processes`` positions. So a step's
data, its noise and its times follow from the step's number alone: a resume needs no replay, and the stream is the same for
every number of processes that gives the same global batch.

Pictures of several sizes are several such streams, one per size, and every step takes its whole batch from one of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset, Sampler

from sdxl_ambient.geometry import Size, bucket_counts, mirrored, size_of
from sdxl_ambient.manifest import hash_bytes, hash_json, read_json
from sdxl_ambient.models import Conditioning
from sdxl_ambient.noise import CLEAN
from sdxl_ambient.plan import StoreError, observed_levels, rounds, shards
from sdxl_ambient.plan import spoken_levels as in_words

EMPTY = hash_bytes(b"")  # the caption of a sample that is shown without one
_SMALL = ("t_n", "tokens", "dropped", "flipped")  # what of a batch travels as arrays
MAXIMUM_OPEN = 64  # shards that a process keeps open


@dataclass
class Batch:
    """``x_n`` (b, 4, h, w) noisy latents at levels ``t_n`` (b,), −1 for clean; what they show; ``positions`` (b,) in the
    stream, which seed each sample's noise and time; ``contents`` (b,), the hashes that name the pictures; ``tokens``
    (b, 2, 77) of the captions for both text encoders, where the store has them; which samples are ``dropped`` (b,), shown
    without their caption, and which ``flipped`` (b,), mirrored."""

    x_n: torch.Tensor
    t_n: torch.Tensor
    conditioning: Conditioning
    positions: list[int]
    contents: list[str]
    tokens: torch.Tensor | None = None
    dropped: torch.Tensor | None = None
    flipped: torch.Tensor | None = None

    def __post_init__(self):
        for name in ("dropped", "flipped"):
            if getattr(self, name) is None:
                setattr(self, name, torch.zeros(len(self.positions), dtype=torch.bool))

    def __getstate__(self) -> dict:
        # From a worker each tensor comes through a file of its own, arrays come all at once: the small ones are arrays.
        arrays = {name: x.numpy() for name in _SMALL if (x := getattr(self, name)) is not None}
        embeds, pooled, time_ids = (getattr(self.conditioning, name) for name in ("prompt_embeds", "pooled", "time_ids"))
        return {**self.__dict__, **arrays, "conditioning": (embeds, pooled, time_ids.numpy())}

    def __setstate__(self, state: dict) -> None:
        tensors = {name: torch.from_numpy(x) for name in _SMALL if (x := state[name]) is not None}
        embeds, pooled, time_ids = state["conditioning"]
        tensors["conditioning"] = Conditioning(embeds, pooled, torch.from_numpy(time_ids))
        self.__dict__.update(state, **tensors)

    def first(self, count: int) -> Batch:
        """Its first samples."""
        rows = slice(count)
        return Batch(
            self.x_n[rows],
            self.t_n[rows],
            self.conditioning.rows(rows),
            self.positions[rows],
            self.contents[rows],
            None if self.tokens is None else self.tokens[rows],
            self.dropped[rows],
            self.flipped[rows],
        )

    def generators(self, seed: int) -> list[torch.Generator]:
        """One CPU generator per sample, seeded by (seed, position in the stream)."""
        return [sample_generator(seed, "train", p) for p in self.positions]


def sample_generator(seed: int, purpose: str, index: int | str) -> torch.Generator:
    """A CPU generator for one sample; independent for every (seed, purpose, index), which may be a content hash."""
    # A hash, since neighbouring seeds of the Mersenne twister start alike.
    return torch.Generator().manual_seed(int(hash_json([seed, purpose, index])[:8], 16))


@dataclass(frozen=True)
class Showing:
    """How pictures are shown: half of them mirrored with ``random_flip``; a part ``empty_prompts`` of them without their
    caption, which is zeros with ``zero_empty``, as SDXL's own pipeline has it, else the embedding of "". What is drawn
    follows from ``seed`` and the position in the stream."""

    seed: int = 0
    random_flip: bool = False
    empty_prompts: float = 0.0
    zero_empty: bool = True


class LatentStore(Dataset):
    """A finished store of noisy latents. An item is asked for as (position in the stream, index of the picture).

    ``rounds`` tells how its latents were restored (:mod:`sdxl_ambient.loop`), and is empty where they are observations;
    ``observed`` has the level that each picture was observed at, by content, which then is not the latent's own.

    Raises:
        StoreError: unfinished, damaged, of another format, or without what ``showing`` needs.
    """

    def __init__(self, folder: str | Path, limit: int | None = None, showing: Showing | None = None):
        self.folder, self.showing = Path(folder), showing or Showing()
        if not (self.folder / "manifest.json").is_file():
            raise StoreError(f"{self.folder} is not a finished store of latents: it has no manifest.json")
        try:
            self.manifest = read_json(self.folder / "manifest.json")
            self.images = self.manifest["images"][:limit]
            self._file_of = {i["content"]: name for name, entries in shards(self.manifest) for i in entries}
            self._prompts, self._tokens = self.manifest["prompts"], self.manifest.get("tokens")
            self.observed = observed_levels(self.manifest)
            self.rounds = rounds(self.manifest)
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.folder / 'manifest.json'} is damaged: {error}") from None
        if self.showing.empty_prompts and not self.showing.zero_empty and EMPTY not in self._prompts:
            raise StoreError(
                f"{self.folder} was made by an earlier version, without the empty prompt; run again with the images"
            )
        self._open: OrderedDict[str, object] = OrderedDict()

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict:
        # Open files do not travel to a worker process.
        return {**self.__dict__, "_open": OrderedDict()}

    @property
    def hash(self) -> str:
        """Identifies the store in artefacts: a hash of its plan, which says nothing of the noise."""
        own = [i["t_n"] for i in self.manifest["images"]]
        uniform = set(own) == {self.manifest["fingerprint"]["latent"]["t_n"]}
        contents = [i["content"] for i in self.manifest["images"]]
        restored = [self.chain, [self.observed[c] for c in contents]] if self.rounds else []
        return hash_json([self.manifest["fingerprint"], contents, *([] if uniform else [own]), *restored])

    @property
    def chain(self) -> list[dict]:
        """``rounds`` as artefacts that are shared tell them: without the key's id."""
        return [{name: value for name, value in link.items() if name != "key_id"} for link in self.rounds]

    @property
    def schedule_hash(self) -> str:
        """The noise schedule that the latents were made with."""
        return self.manifest["fingerprint"]["latent"]["schedule"]

    @cached_property
    def groups(self) -> dict[Size, list[int]]:
        """Indices of the pictures of each size in pixels, since a batch holds one size."""
        found: dict[Size, list[int]] = {size: [] for size in bucket_counts(self.images)}
        for index, entry in enumerate(self.images):
            found[size_of(entry)].append(index)
        return found

    def _file(self, name: str):
        """A shard, kept open; of many the least recently used one is closed."""
        if name not in self._open:
            self._open[name] = safe_open(str(self.folder / name), "pt")
            if len(self._open) > MAXIMUM_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]

    def _tensor(self, file: str, name: str) -> torch.Tensor:
        try:
            return self._file(file).get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{self.folder / file} is damaged: {error}") from None

    def __getitem__(self, item: tuple[int, int]) -> dict:
        position, index = item
        entry = self.images[index]
        caption, dropped, flipped = self._drawn(entry["captions"], position)
        file = self._prompts[caption]
        x_n = self._tensor(self._file_of[entry["content"]], entry["content"])
        embeds, pooled = self._tensor(file, f"{caption}.embeds"), self._tensor(file, f"{caption}.pooled")
        if dropped and self.showing.zero_empty:
            embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        tokens = self._tokens and self._tensor(self._tokens, f"{EMPTY if dropped else caption}.tokens")
        return {
            # The stored latent is mirrored: a mirrored picture that is observed anew would be a second observation.
            "x_n": x_n.flip(-1) if flipped else x_n,
            "t_n": CLEAN if entry["t_n"] is None else entry["t_n"],
            "embeds": embeds,
            "pooled": pooled,
            "time_ids": mirrored(entry["time_ids"]) if flipped else entry["time_ids"],
            "position": position,
            "content": entry["content"],
            "tokens": tokens,
            "dropped": dropped,
            "flipped": flipped,
        }

    def _drawn(self, captions: list[str], position: int) -> tuple[str, bool, bool]:
        """How the sample at a position is shown: the caption whose embedding is read, whether it is shown without one, and
        whether it is mirrored. Only what is asked for is drawn."""
        how = self.showing
        if len(captions) == 1 and not how.empty_prompts and not how.random_flip:
            return captions[0], False, False
        generator = sample_generator(how.seed, "shown", position)
        several = len(captions) > 1
        caption = captions[int(torch.randint(len(captions), (), generator=generator))] if several else captions[0]
        dropped = bool(how.empty_prompts) and float(torch.rand((), generator=generator)) < how.empty_prompts
        flipped = how.random_flip and float(torch.rand((), generator=generator)) < 0.5
        return EMPTY if dropped and not how.zero_empty else caption, dropped, flipped


# -- levels and sizes of a store ----------------------------------------------------------------------


def levels_of(store: LatentStore) -> list[int]:
    """The noise levels of a store's pictures, lowest first, −1 for clean."""
    return sorted({CLEAN if i["t_n"] is None else i["t_n"] for i in store.manifest["images"]})


def common_t_n(store: LatentStore):
    """The store's noise level; None for clean, "mixed" where images have different ones."""
    return _common([i["t_n"] for i in store.manifest["images"]])


def observed_t_n(store: LatentStore):
    """The same of the observations that the store's latents are, or were restored from."""
    return _common(store.observed.values())


def _common(levels: Iterable[int | None]):
    found = set(levels)
    return "mixed" if len(found) > 1 else next(iter(found))


def spoken_levels(store: LatentStore) -> str:
    """The store's noise levels, as a message names them."""
    return in_words(i["t_n"] for i in store.manifest["images"])


def check_stores(store: LatentStore, heldout: LatentStore | None, schedule, low_noise: str = "skip") -> list[str]:
    """The base model's schedule must be the one that the stores were made with, held-out images must be at levels that
    training has, and there must be levels below t_n for what ``low_noise`` does there. Returns notes to print, of restored
    samples among them.

    Raises:
        StoreError: naming what is wrong.
    """
    trained = levels_of(store)
    if low_noise != "skip" and trained == [CLEAN]:
        raise StoreError(f"--low_noise: {low_noise!r} has nothing to do, {store.folder} holds clean latents; use skip")
    for one in filter(None, (store, heldout)):
        if one.schedule_hash != schedule.hash:
            raise StoreError(f"the store {one.folder} was made with another noise schedule than the base model's")
    if low_noise == "clean" and store.rounds:
        raise StoreError(f"--low_noise: 'clean' needs observations, {store.folder} holds restored samples; use skip")
    notes = restored_notes(store, heldout)
    if heldout is None or levels_of(heldout) == trained:
        return notes
    said = f"{heldout.folder} is at t_n = {spoken_levels(heldout)}, {store.folder} at {spoken_levels(store)}"
    seen = levels_of(heldout)
    if seen[0] < trained[0] or seen[-1] > trained[-1]:
        raise StoreError(said)
    return [*notes, f"note: {said}; the held-out loss is that of its own levels"]


def restored_notes(store: LatentStore, heldout: LatentStore | None) -> list[str]:
    """What has to be said of stores of restored samples; nothing of observations."""
    notes = []
    if store.rounds:
        images = store.manifest["images"]
        drawn = [i for i in images if i["t_n"] != i["observed_t_n"]]
        levels, observed = (in_words(i[name] for i in drawn) for name in ("t_n", "observed_t_n"))
        promise = f"what protects the images stays what t_n = {observed} promises"
        if any(link["foreign_model"] for link in store.rounds):
            promise = "a model that may have seen more of the images drew them, so no t_n says what protects those"
        notes.append(
            f"note: {len(drawn)} of {len(images)} images of {store.folder} are restored samples at t_n = {levels}, drawn "
            f"by a model from observations at t_n = {observed}: not observations, and {promise}"
        )
    if heldout is not None and bool(heldout.rounds) != bool(store.rounds):
        which = (store, heldout) if store.rounds else (heldout, store)
        notes.append(
            f"note: {which[0].folder} holds restored samples and {which[1].folder} observations, so that their losses "
            "differ by more than what was memorised"
        )
    return notes


def small_groups(groups: Mapping[Size, Sequence[int]], batch_size: int) -> list[str]:
    """One line for every size with fewer pictures than a global batch, ``batch_size``, which then shows some of them more
    than once. A store of one size has no such line."""
    few = {size: len(members) for size, members in groups.items() if len(members) < batch_size}
    return [
        f"note: {count} pictures of {height} x {width} pixels are fewer than the {batch_size} of a batch, which repeats them"
        for (height, width), count in few.items()
        if len(groups) > 1
    ]


# -- batches ----------------------------------------------------------------------


def collate(items: Sequence[dict]) -> Batch:
    """Items of a :class:`LatentStore` → :class:`Batch`."""
    return Batch(
        x_n=torch.stack([i["x_n"] for i in items]),
        t_n=torch.tensor([i["t_n"] for i in items]),
        conditioning=Conditioning(
            torch.stack([i["embeds"] for i in items]),
            torch.stack([i["pooled"] for i in items]),
            torch.tensor([i["time_ids"] for i in items], dtype=torch.float32),
        ),
        positions=[i["position"] for i in items],
        contents=[i["content"] for i in items],
        tokens=None if items[0]["tokens"] is None else torch.stack([i["tokens"] for i in items]),
        dropped=torch.tensor([i["dropped"] for i in items]),
        flipped=torch.tensor([i["flipped"] for i in items]),
    )


class Stream(Sampler):
    """This process's batches of (position, index), from micro-step ``start`` to before ``stop``.

    ``size`` pictures: all of a store, or those in ``groups``, the pictures of each size. Streams of different ``purpose``
    have different orders.

    With G samples in a global batch, epoch e holds ⌊(e+1) n/G⌋ − ⌊e n/G⌋ batches of a group of n pictures, so that every
    picture is shown equally often in the long run; which group comes when is drawn for each epoch. A group is an endless
    stream of its own, of which its j-th batch takes places j·G to (j+1)·G − 1.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        *,
        start: int = 0,
        stop: int,
        rank: int = 0,
        processes: int = 1,
        groups: Iterable[Sequence[int]] | None = None,
        purpose: str = "order",
    ):
        self.groups = [range(size)] if groups is None else list(groups)
        assert sum(map(len, self.groups)) == size and all(self.groups)
        self.size, self.batch_size, self.seed, self.purpose = size, batch_size, seed, purpose
        self.start, self.stop, self.rank, self.processes = start, stop, rank, processes
        self._orders: dict[int, tuple[int, list[int]]] = {}
        self._epoch: tuple[int, int, list[tuple[int, int]]] = (-1, 0, [])

    def __len__(self) -> int:
        return self.stop - self.start

    def index(self, group: int, place: int) -> int:
        """The picture at a place of a group's endless stream."""
        members = self.groups[group]
        epoch, within = divmod(place, len(members))
        if self._orders.get(group, (-1, []))[0] != epoch:
            purpose = self.purpose if len(self.groups) == 1 else f"{self.purpose} of group {group}"
            generator = sample_generator(self.seed, purpose, epoch)
            self._orders[group] = epoch, torch.randperm(len(members), generator=generator).tolist()
        return members[self._orders[group][1][within]]

    def _before(self, epoch: int) -> list[int]:
        """How many global batches of each group there are before an epoch."""
        return [epoch * len(members) // (self.batch_size * self.processes) for members in self.groups]

    def _first(self, epoch: int) -> int:
        """The micro-step that an epoch begins with."""
        return sum(self._before(epoch))

    def batch(self, step: int) -> tuple[int, int]:
        """Which group the global batch of a micro-step is from, and which of that group's batches it is."""
        if len(self.groups) == 1:
            return 0, step
        epoch, first, batches = self._epoch
        if not first <= step < first + len(batches):
            # By the end of this epoch every group has had enough batches, whatever the rounding took from it.
            last = (step + 1 + len(self.groups)) * self.batch_size * self.processes // self.size + 1
            epoch = bisect_right(range(last + 1), step, key=self._first) - 1
            first, batches = self._first(epoch), self._batches(epoch)
            self._epoch = epoch, first, batches
        return batches[step - first]

    def _batches(self, epoch: int) -> list[tuple[int, int]]:
        """The global batches of an epoch, in their order, as :meth:`batch` gives them."""
        spans = [range(*span) for span in zip(self._before(epoch), self._before(epoch + 1), strict=True)]
        groups = [group for group, span in enumerate(spans) for _ in span]
        generator = sample_generator(self.seed, f"{self.purpose} buckets", epoch)
        drawn = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        # Which group comes next is drawn; each group's own batches come in their order.
        upcoming = [iter(span) for span in spans]
        return [(group, next(upcoming[group])) for group in drawn]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            group, batch = self.batch(step)
            offset = self.rank * self.batch_size
            position, place = (k * self.processes * self.batch_size + offset for k in (step, batch))
            yield [(position + i, self.index(group, place + i)) for i in range(self.batch_size)]


def loader(store: LatentStore, stream: Stream, workers: int = 0) -> DataLoader:
    """Batches of a store in a stream's order. Not for Accelerate to prepare: the stream already is this process's share."""
    return DataLoader(store, batch_sampler=stream, collate_fn=collate, num_workers=workers, generator=torch.Generator())
