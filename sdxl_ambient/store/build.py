"""Builds a store: images are read and planned, each is observed once, its captions are embedded, the manifest is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from sdxl_ambient.devices import locked_by_main
from sdxl_ambient.errors import ImageError, StoreError, UserError
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.images.load import Record, load_rgb
from sdxl_ambient.images.sources import Log
from sdxl_ambient.models.load import Encoders
from sdxl_ambient.models.vae import encode_image
from sdxl_ambient.noise import NoiseSchedule, levels
from sdxl_ambient.provenance import versions, write_sealed
from sdxl_ambient.store.collect import Collected, collect
from sdxl_ambient.store.keys import NoiseKey, shared_key
from sdxl_ambient.store.observation import draw_z
from sdxl_ambient.store.plan import fingerprint, latent_hash_of, make_plan, plan_of, shards
from sdxl_ambient.store.prenoised import (
    fingerprint_of_latents,
    ids_of_latent,
    latent_hash,
    load_latent,
)
from sdxl_ambient.store.prompts import write_texts
from sdxl_ambient.store.reconcile import known_hashes, reconcile_plan, remove_dropped
from sdxl_ambient.store.records import Counts, Entry, Hashes, LatentSettings, Manifest, Plan, Prompts
from sdxl_ambient.store.scan import Check, Scanned, content_hash
from sdxl_ambient.store.settings import StoreSettings
from sdxl_ambient.store.shards import (
    Shard,
    header_hashes,
    look_at,
    prune,
    remove_leftovers,
    remove_mark,
    write_latent_shard,
)
from sdxl_ambient.store.validate import read_manifest

THREADS = min(8, os.cpu_count() or 1)  # that check shards
LatentMaker = Callable[[Entry, Record], torch.Tensor]  # what the store holds of a planned picture


def build_store(
    train_data_dir: str | Path | None,
    output_dir: str | Path,
    encoders: Encoders,
    schedule: NoiseSchedule,
    settings: StoreSettings,
    *,
    state: PartialState | None = None,
    log: Log = print,
    check: Check = lambda: None,
) -> Manifest:
    """Make a store, finish an interrupted one, or confirm that the one there is what is wanted. Returns its manifest.

    Every process calls it; each encodes its own share. Pictures come from the folder ``train_data_dir``, or from the data
    set that ``settings`` name. ``check`` is called between pictures; what it raises ends the work, and the next call goes
    on.

    Raises:
        ImagesMissing, StoreError, NoiseKeyError, ModelError: with one line that says what is wrong.
    """
    state = state or PartialState()
    log = log if state.is_main_process else (lambda message: None)
    collected = collect(train_data_dir, encoders, settings, state, log, check)
    return build_collected(collected, output_dir, encoders, schedule, settings, state, log, check)


def build_collected(
    collected: Collected,
    output_dir: str | Path,
    encoders: Encoders,
    schedule: NoiseSchedule,
    settings: StoreSettings,
    state: PartialState,
    log: Log,
    check: Check = lambda: None,
) -> Manifest:
    """:func:`build_store` of pictures that were opened before."""
    output_dir = Path(output_dir)
    with locked_by_main(output_dir, log, state):
        plan, key = plan_store(output_dir, collected.pictures, encoders, schedule, settings, state, log)
        latents = plan["fingerprint"]["latent"]
        make = take if settings.pre_noised else NoisyLatentMaker(latents, encoders, schedule, settings.geometry, key)
        write_latents(output_dir, plan, collected.records, make, state, log, check)
        prompts, counts = write_texts(
            output_dir, collected.pictures, encoders, settings.shard_size, settings.keep_tokens, state, log, check
        )
        return write_manifest(output_dir, plan, collected, prompts, counts, state, log)


# -- 1: scanned pictures => a plan ------------------------------------------------------------------


def plan_store(
    output_dir: Path,
    pictures: Sequence[Scanned],
    encoders: Encoders,
    schedule: NoiseSchedule,
    settings: StoreSettings,
    state: PartialState,
    log: Log,
) -> tuple[Plan, NoiseKey | None]:
    """The plan that all processes follow, which is then on disk, and the key that the noise is made from, if any is drawn.

    Raises:
        StoreError: the store there is of something else, or the pictures were observed before and that isn't allowed.
        NoiseKeyError: a key that can't be used.
    """
    wanted = wanted_plan(pictures, encoders, schedule, settings)
    # Shards so small that every process has work.
    size = max(1, min(settings.shard_size, -(-len(wanted["images"]) // state.num_processes)))
    noisy = not settings.pre_noised and any(entry["t_n"] is not None for entry in wanted["images"])
    key = shared_key(settings.noise_key, settings.noise_key_file, state) if noisy else None
    plan = reconcile_on_main(output_dir, wanted, key, size, settings.allow_second_observation, log, state)
    report_clean(plan["images"], output_dir, log)
    return plan, key


def wanted_plan(pictures: Sequence[Scanned], encoders: Encoders, schedule: NoiseSchedule, settings: StoreSettings) -> Plan:
    """What a store of these pictures holds, wherever it lies and whatever is there already."""
    if settings.pre_noised:
        marks = fingerprint_of_latents(encoders, schedule, settings.t_n)
        return plan_of(marks, pictures, ids_of_latent, settings.shard_size)
    marks = fingerprint(encoders, schedule, settings.geometry, settings.t_n)
    return make_plan(marks, pictures, settings.geometry, settings.shard_size)


def reconcile_on_main(
    output_dir: Path, wanted: Plan, key: NoiseKey | None, size: int, allowed: bool, log: Log, state: PartialState
) -> Plan:
    """The main process looks at the disk, decides and writes the plan; all get its decision, or its error."""
    plan, error = wanted, None
    if state.is_main_process:
        try:
            if left := remove_leftovers(output_dir):
                log(f"note: {left} files of an interrupted write are deleted from {output_dir}")
            plan = reconcile_plan(output_dir, wanted, key, size, allowed, log)
            remove_dropped(output_dir, plan)
        except (UserError, OSError) as failure:
            error = str(failure)
    if state.num_processes > 1:
        plan, error = gather_object([(plan, error)])[0]
    if error is not None:
        raise StoreError(error)
    return plan


# -- 2: a plan => latents ------------------------------------------------------------------


@dataclass(frozen=True)
class NoisyLatentMaker:
    """Makes noisy latents of pictures."""

    latents: LatentSettings
    encoders: Encoders
    schedule: NoiseSchedule
    geometry: Geometry
    key: NoiseKey | None

    def __call__(self, entry: Entry, record: Record) -> torch.Tensor:
        """One picture's only observation x_n, (4, h, w) float32 on the CPU."""
        image = load_rgb(record.read())
        if content_hash(image) != entry["content"]:
            raise ImageError("changed while it was being encoded")
        pixels, _ = self.geometry.apply(image, entry["content"])
        x_0 = encode_image(self.encoders.vae, pixels)
        if entry["t_n"] is None or self.key is None:
            return x_0.contiguous()
        what = latent_hash_of(self.latents, entry)
        z = draw_z(self.key.secret, what, entry["content"], self.schedule, entry["t_n"], tuple(x_0.shape)).float()
        return self.schedule.observe(x_0[None], levels(entry["t_n"], 1), z[None])[0].contiguous()


def take(entry: Entry, record: Record) -> torch.Tensor:
    """A latent that is noisy already, as its file has it."""
    latent = load_latent(record.path)
    if latent_hash(latent) != entry["content"]:
        raise ImageError("changed while it was being read")
    return latent


def write_latents(
    output_dir: Path,
    plan: Plan,
    records: Mapping[str, Record],
    make: LatentMaker,
    state: PartialState,
    log: Log,
    check: Check = lambda: None,
) -> None:
    """Make this process's share of the shards that aren't there yet, and check the others. ``records`` are by content.

    Raises:
        StoreError: a damaged shard, a picture that changed, a full disk. All shards that are whole stay.
    """
    known = known_hashes(output_dir, plan)
    share = shards(plan)[state.process_index :: state.num_processes]
    todo = unfinished(output_dir, share, known, advice_for(plan), state, check)
    total = sum(len(entries) for _, entries in todo)
    with tqdm(total=total, desc="encoding images", unit="img", disable=not state.is_main_process, mininterval=1) as bar:
        for name, entries in todo:
            tensors = {}
            for entry in entries:
                check()
                record = records[entry["content"]]
                try:
                    tensors[entry["content"]] = make(entry, record)
                except ImageError as error:
                    raise StoreError(f"{record.name}: {error}") from None
                bar.update()
            write_latent_shard(output_dir / name, tensors)
            if name in known and any(known[name].get(n, h) != h for n, h in header_hashes(output_dir / name).items()):
                log(f"note: {name} was made again with the same noise; the last bits differ, as another machine's do")


def advice_for(plan: Plan) -> str:
    """What to do about a damaged shard."""
    if plan.get("key_id") is None and not plan["fingerprint"]["latent"].get("pre_noised"):
        return "drawing it anew would be a second observation of its images. Restore the file"
    return "delete the file, and it is made again with the same noise"


def unfinished(
    output_dir: Path,
    share: Sequence[tuple[str, list[Entry]]],
    known: Mapping[str, Mapping[str, str]],
    advice: str,
    state: PartialState,
    check: Check,
) -> list[tuple[str, list[Entry]]]:
    """The shards of a share that are still to be drawn. Every bit of the others is checked, in threads.

    Shards with pictures that left the plan are written anew without them.
    """

    def look(shard: tuple[str, list[Entry]]) -> Shard:
        name, entries = shard
        check()
        try:
            return look_at(output_dir / name, [i["content"] for i in entries], known.get(name))
        except StoreError as error:
            raise StoreError(f"{error}; {advice}") from None

    there = [(name, entries) for name, entries in share if (output_dir / name).exists()]
    missing = [(name, entries) for name, entries in share if not (output_dir / name).exists()]
    with ThreadPoolExecutor(THREADS) as pool:
        looks = tqdm(
            pool.map(look, there), "checking shards", len(there), unit="shard",
            disable=not state.is_main_process or not there, mininterval=1, delay=1,
        )  # fmt: skip
        for (name, entries), found in zip(there, looks, strict=True):
            if found is Shard.LARGER:
                prune(output_dir / name, [i["content"] for i in entries])
    return missing


# -- 3: the manifest ------------------------------------------------------------------


def write_manifest(
    output_dir: Path,
    plan: Plan,
    collected: Collected,
    prompts: Prompts,
    texts: Counts,
    state: PartialState,
    log: Log,
) -> Manifest:
    """Finish a store: what it holds, what was left out, and what it was made with."""
    images = len(plan["images"])
    counts = {
        "files": collected.files,
        "images": images,
        "exact_duplicates": len(collected.pictures) - images,
        "captions": texts["captions"],
        "captions_cut": texts["captions_cut"],
        "skipped": len(collected.skipped),
    }
    manifest: Manifest = {
        **plan,
        **prompts,
        "sha256": {},
        "counts": counts,
        "skipped": collected.skipped,
        "near_duplicates": collected.twins,
        "ledger": collected.ledger(),
        "versions": versions(),
    }
    if state.is_main_process:
        manifest["sha256"] = hashes_of(output_dir, plan, prompts)
        write_sealed(output_dir / "manifest.json", manifest)
        for name, _ in shards(plan):
            remove_mark(output_dir / name)
        log(f"{output_dir}: {images} images, {counts['captions']} captions, {counts['skipped']} skipped")
    state.wait_for_everyone()
    return manifest if state.is_main_process else read_manifest(output_dir)


def hashes_of(output_dir: Path, plan: Plan, prompts: Prompts) -> Hashes:
    """The hashes of all tensors of a store, from the headers of files that were written or checked by this run."""
    latents = {name: [i["content"] for i in entries] for name, entries in shards(plan)}
    texts = sorted({*prompts["prompts"].values(), *([prompts["tokens"]] if "tokens" in prompts else [])})
    found = {name: header_hashes(output_dir / name) for name in [*latents, *texts]}
    return {**found, **{name: {c: found[name][c] for c in contents} for name, contents in latents.items()}}


# -- reports ------------------------------------------------------------------


def report_clean(entries: Sequence[Entry], output_dir: Path, log: Log) -> None:
    """Say so where a store holds clean latents."""
    clean = sum(entry["t_n"] is None for entry in entries)
    if clean == len(entries):
        log(f"note: t_n is none, so {output_dir} holds clean latents, which decode to the images")
    elif clean:
        log(
            f"note: {clean} of {len(entries)} images are told to be clean, so {output_dir} holds their clean latents, which "
            "decode to the images"
        )
