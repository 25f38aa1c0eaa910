"""One round of the loop: plan, draw, captions, manifest."""

from __future__ import annotations

import uuid
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from sdxl_ambient.devices import DTYPES, Placement, locked_by_main
from sdxl_ambient.errors import StoreError, UserError
from sdxl_ambient.images.sources import Log
from sdxl_ambient.loop.draw import RestoredLatentMaker, missing_shards, prompts_of, share_texts, write_samples
from sdxl_ambient.loop.model import load_model, training_info
from sdxl_ambient.loop.provenance import check_base, check_history, next_round, seen_besides
from sdxl_ambient.loop.settings import LoopSettings
from sdxl_ambient.models.base import check_sdxl, load_schedule
from sdxl_ambient.models.prediction import check_prediction
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.provenance import differences, versions, write_sealed
from sdxl_ambient.store.build import hashes_of
from sdxl_ambient.store.checks import format_store_levels
from sdxl_ambient.store.lineage import lineage_of, lowered
from sdxl_ambient.store.plan import place, shards
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.store.reconcile import compare
from sdxl_ambient.store.records import Entry, Manifest, Plan, Round
from sdxl_ambient.store.shards import remove_leftovers, remove_mark
from sdxl_ambient.store.validate import read_manifest, read_plan


def make_plan(store: LatentStore, new: Round, shard_size: int) -> Plan:
    """What the new store will hold, as :func:`sdxl_ambient.store.plan.make_plan`'s of a first one."""
    marks, t_m = store.manifest["fingerprint"], new["t_n"]
    images: list[Entry] = [
        {**i, "t_n": t_m if lowered(i, t_m) else i["t_n"], "observed_t_n": store.observed[i["content"]]}
        for i in store.images
    ]
    return {
        "fingerprint": {**marks, "latent": {**marks["latent"], "t_n": t_m}},
        "shard_size": shard_size,
        "images": place(images, shard_size),
        "store_id": uuid.uuid4().hex,
        "restored": [*store.lineage, new],
    }


def reconcile_restored_plan(output: Path, wanted: Plan) -> Plan:
    """The plan to follow: the stored one if it agrees, so that an interrupted round goes on, else the wanted one.

    Raises:
        StoreError: a store of something else, or a damaged one.
    """
    stored = read_plan(output)
    if stored is None:
        if next(output.glob("latents-*.safetensors"), None) is not None:
            raise StoreError(f"{output} holds latents but no plan.json, so what they are can't be told; use another folder")
        return wanted
    lineage, rounds = lineage_of(stored), lineage_of(wanted)
    if len(lineage) != len(rounds):
        raise StoreError(f"the store {output} is of another number of rounds; use another folder")
    differing = compare(stored, wanted)
    if {i["content"] for i in stored["images"]} != {i["content"] for i in wanted["images"]}:
        differing.append(
            f"images: {len(stored['images'])} are planned, the store that is restored has {len(wanted['images'])}"
        )
    for number, pair in enumerate(zip(lineage, rounds, strict=True), 1):
        # Another version of the software goes on, since the version that began is recorded.
        old, new = ({k: v for k, v in a_round.items() if k != "versions"} for a_round in pair)
        differing += differences(old, new, f"round {number}: ")
    if differing:
        raise StoreError(f"the store {output} is of something else ({'; '.join(differing)}); use another folder")
    known = {i["content"]: i["shard"] for i in stored["images"]}  # pyright: ignore[reportTypedDictNotRequiredAccess]
    size = stored["shard_size"]
    images = place(wanted["images"], size, known)
    return {**wanted, "images": images, "shard_size": size, "store_id": stored["store_id"], "restored": lineage}  # pyright: ignore[reportTypedDictNotRequiredAccess]


def decide(settings: LoopSettings, store: LatentStore, schedule: NoiseSchedule, processes: int, log: Log) -> Plan:
    """Check everything, and give the plan to follow, which is then on disk. The main process calls it.

    Raises:
        StoreError, ModelError, InterchangeError, CheckpointError: with one line that says what is wrong.
    """
    if not any(lowered(i, settings.t_n) for i in store.images):
        raise StoreError(
            f"--t_n: {settings.t_n} is not below the level of any image in {store.folder}, t_n = "
            f"{format_store_levels(store)}"
        )
    info = training_info(settings)
    foreign = check_history(settings, store, info)
    check_base(settings, store, schedule, info)
    if foreign and settings.model is not None:
        log(f"warning: --{settings.model[0]} {seen_besides(info, store)}, and --allow_foreign_model lets it restore")
    new = next_round(settings, store, info, foreign)
    size = max(1, min(store.manifest["shard_size"], -(-len(store) // processes)))
    plan = reconcile_restored_plan(Path(settings.output_dir), make_plan(store, new, size))
    if left := remove_leftovers(Path(settings.output_dir)):
        log(f"note: {left} files of an interrupted write are deleted from {settings.output_dir}")
    write_sealed(Path(settings.output_dir) / "plan.json", plan)
    return plan


def decide_on_main(
    settings: LoopSettings, store: LatentStore, schedule: NoiseSchedule, state: PartialState, log: Log
) -> Plan:
    """:func:`decide`'s plan on every process, or its error."""
    plan: Plan | None = None
    failure: str | None = None
    if state.is_main_process:
        try:
            plan = decide(settings, store, schedule, state.num_processes, log)
        except (UserError, OSError) as error:
            failure = str(error)
    if state.num_processes > 1:
        plan, failure = gather_object([(plan, failure)])[0]
    if plan is None:
        raise StoreError(failure)
    return plan


def restore_store(settings: LoopSettings, state: PartialState | None = None, log: Log = print) -> Manifest:
    """Restore a store, finish an interrupted round, or confirm that the store there is what is wanted. Returns its
    manifest.

    Every process calls it; each restores its own share.

    Raises:
        StoreError, ModelError, InterchangeError, CheckpointError: with one line that says what is wrong.
    """
    state = state or PartialState()
    log = log if state.is_main_process else (lambda message: None)
    output, store = Path(settings.output_dir), LatentStore(settings.latents_dir)
    base, predicts = settings.pretrained_model_name_or_path, settings.prediction_type
    check_sdxl(base, settings.revision, log, predicts)
    schedule = load_schedule(base, settings.revision, predicts)
    store.verify(quiet=not state.is_main_process)
    with locked_by_main(output, log, state):
        return _restore(settings, store, schedule, output, state, log)


def _restore(
    settings: LoopSettings, store: LatentStore, schedule: NoiseSchedule, output: Path, state: PartialState, log: Log
) -> Manifest:
    plan = decide_on_main(settings, store, schedule, state, log)
    if todo := missing_shards(output, plan, state):
        device = state.device or torch.device("cpu")
        unet = Placement(device).use(load_model(settings, DTYPES[settings.dtype]))
        source = repr(settings.unet or settings.pretrained_model_name_or_path)
        check_prediction(unet, schedule, source, settings.prediction_type)
        write_samples(output, todo, RestoredLatentMaker(store, unet, schedule, settings), quiet=not state.is_main_process)
    state.wait_for_everyone()
    manifest = manifest_of(store, plan)
    if state.is_main_process:
        share_texts(store, output)
        manifest["sha256"] = hashes_of(output, plan, prompts_of(store))
        write_sealed(output / "manifest.json", manifest)
        for name, _ in shards(plan):
            remove_mark(output / name)
        counts = manifest["counts"]
        log(
            f"{output}: {counts['restored']} images restored to t_n = {settings.t_n}; {counts['taken_over']} at or below it "
            f"and {counts['clean']} clean ones taken over as they were"
        )
    state.wait_for_everyone()
    return manifest if state.is_main_process else read_manifest(output)


def manifest_of(store: LatentStore, plan: Plan) -> Manifest:
    """A restored store's manifest. Names of files that a first store skipped are in that one's alone."""
    clean = sum(entry["t_n"] is None for entry in plan["images"])
    restored = lineage_of(plan)[-1]["images_restored"]
    own = {"skipped": 0, "restored": restored, "taken_over": len(plan["images"]) - restored - clean, "clean": clean}
    return {
        **plan,
        "sha256": {},
        "counts": {**store.manifest["counts"], **own},
        "skipped": [],
        "near_duplicates": None,
        "ledger": None,
        "versions": versions(),
        **prompts_of(store),
    }
