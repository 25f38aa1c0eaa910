"""Stored shards → batches, in an order that depends on nothing but the seed.

The training data is one endless stream of samples: each epoch is a permutation of the store drawn from (seed, epoch), and
one epoch follows the other without a gap. Micro-step k of a run takes the next ``batch × processes`` positions. So a step's
data, its noise and its times follow from the step's number alone: a resume needs no replay, and the stream is the same for
every number of processes that gives the same global batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset, Sampler

from sdxl_ambient.manifest import hash_json, read_json
from sdxl_ambient.models import Conditioning
from sdxl_ambient.noise import CLEAN
from sdxl_ambient.plan import StoreError, shards


@dataclass
class Batch:
    """``x_n`` (b, 4, h, w) noisy latents at levels ``t_n`` (b,), −1 for clean; what they show; ``positions`` (b,) in the
    stream, which seed each sample's noise and time; ``contents`` (b,), the hashes that name the pictures."""

    x_n: torch.Tensor
    t_n: torch.Tensor
    conditioning: Conditioning
    positions: list[int]
    contents: list[str]

    def first(self, count: int) -> Batch:
        """Its first samples."""
        rows = slice(count)
        conditioning = self.conditioning.rows(rows)
        return Batch(self.x_n[rows], self.t_n[rows], conditioning, self.positions[rows], self.contents[rows])

    def generators(self, seed: int) -> list[torch.Generator]:
        """One CPU generator per sample, seeded by (seed, position in the stream)."""
        return [sample_generator(seed, "train", p) for p in self.positions]


def sample_generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator for one sample; independent for every (seed, purpose, index)."""
    # A hash, since neighbouring seeds of the Mersenne twister start alike.
    return torch.Generator().manual_seed(int(hash_json([seed, purpose, index])[:8], 16))


class LatentStore(Dataset):
    """A finished store of noisy latents. An item is asked for as (position in the stream, index of the picture).

    Raises:
        StoreError: unfinished, damaged, or of another format.
    """

    def __init__(self, folder: str | Path, limit: int | None = None):
        self.folder = Path(folder)
        if not (self.folder / "manifest.json").is_file():
            raise StoreError(f"{self.folder} is not a finished store of latents: it has no manifest.json")
        try:
            self.manifest = read_json(self.folder / "manifest.json")
            self.images = self.manifest["images"][:limit]
            self._file_of = {i["content"]: name for name, entries in shards(self.manifest) for i in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.folder / 'manifest.json'} is damaged: {error}") from None
        self._open: dict[str, object] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict:
        # Open files do not travel to a worker process.
        return {**self.__dict__, "_open": {}}

    @property
    def hash(self) -> str:
        """Identifies the store in artefacts: a hash of its plan, which says nothing of the noise."""
        return hash_json([self.manifest["fingerprint"], [i["content"] for i in self.manifest["images"]]])

    @property
    def schedule_hash(self) -> str:
        """The noise schedule that the latents were made with."""
        return self.manifest["fingerprint"]["latent"]["schedule"]

    def _tensor(self, file: str, name: str) -> torch.Tensor:
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(self.folder / file), "pt")
            return self._open[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{self.folder / file} is damaged: {error}") from None

    def __getitem__(self, item: tuple[int, int]) -> dict:
        position, index = item
        entry = self.images[index]
        # A picture with several captions shows another one each time around.
        caption = entry["captions"][position // len(self) % len(entry["captions"])]
        prompts = self.manifest["prompts"][caption]
        return {
            "x_n": self._tensor(self._file_of[entry["content"]], entry["content"]),
            "t_n": CLEAN if entry["t_n"] is None else entry["t_n"],
            "embeds": self._tensor(prompts, f"{caption}.embeds"),
            "pooled": self._tensor(prompts, f"{caption}.pooled"),
            "time_ids": entry["time_ids"],
            "position": position,
            "content": entry["content"],
        }


def common_t_n(store: LatentStore):
    """The store's noise level; None for clean, "mixed" where images have different ones."""
    found = {i["t_n"] for i in store.manifest["images"]}
    return found.pop() if len(found) == 1 else "mixed"


def check_stores(store: LatentStore, heldout: LatentStore | None, schedule, low_noise: str = "skip") -> None:
    """The base model's schedule must be the one that the stores were made with; both must be at the same noise levels, and
    there must be levels below t_n for what ``low_noise`` does there."""
    if low_noise != "skip" and common_t_n(store) is None:
        raise StoreError(f"--low_noise: {low_noise!r} has nothing to do, {store.folder} holds clean latents; use skip")
    for one in filter(None, (store, heldout)):
        if one.schedule_hash != schedule.hash:
            raise StoreError(f"the store {one.folder} was made with another noise schedule than the base model's")
    if heldout is not None and common_t_n(heldout) != common_t_n(store):
        raise StoreError(f"{heldout.folder} is at t_n = {common_t_n(heldout)}, {store.folder} at {common_t_n(store)}")


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
    )


class Stream(Sampler):
    """This process's batches of (position, index), from micro-step ``start`` to before ``stop``.

    ``size`` pictures: all of a store, or the ``members`` of it. Streams of different ``purpose`` have different orders.
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
        members: Sequence[int] | None = None,
        purpose: str = "order",
    ):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.members, self.purpose = members, purpose
        self.start, self.stop, self.rank, self.processes = start, stop, rank, processes
        self._epoch: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.stop - self.start

    def index(self, position: int) -> int:
        """The picture at a position of the endless stream."""
        epoch, within = divmod(position, self.size)
        if self._epoch[0] != epoch:
            generator = sample_generator(self.seed, self.purpose, epoch)
            self._epoch = epoch, torch.randperm(self.size, generator=generator).tolist()
        index = self._epoch[1][within]
        return index if self.members is None else self.members[index]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            first = (step * self.processes + self.rank) * self.batch_size
            yield [(p, self.index(p)) for p in range(first, first + self.batch_size)]


def loader(store: LatentStore, stream: Stream, workers: int = 0) -> DataLoader:
    """Batches of a store in a stream's order. Not for Accelerate to prepare: the stream already is this process's share."""
    return DataLoader(store, batch_sampler=stream, collate_fn=collate, num_workers=workers, generator=torch.Generator())
