"""One round of the loop: plan, draw, captions, manifest."""

from __future__ import annotations

from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from sdxl_ambient.devices import DTYPES
from sdxl_ambient.errors import CheckpointError, InterchangeError, ModelError, StoreError
from sdxl_ambient.loop.draw import RestoredLatentMaker, missing_shards, share_texts, write_samples
from sdxl_ambient.loop.model import load_model, told
from sdxl_ambient.loop.options import LoopOptions, lowered
from sdxl_ambient.loop.provenance import check_base, check_history, make_link, seen_besides
from sdxl_ambient.models.load import check_sdxl, load_schedule
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.provenance import differences, read_json, versions, write_json
from sdxl_ambient.store.checks import format_store_levels
from sdxl_ambient.store.lineage import rounds
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.store.second_observation import compare


def make_plan(store: LatentStore, link: dict, shard_size: int) -> dict:
    """What the new store will hold, as :func:`sdxl_ambient.store.plan.make_plan`'s of a first one."""
    marks, t_m = store.manifest["fingerprint"], link["t_n"]
    images = [
        {**i, "t_n": t_m if lowered(i, t_m) else i["t_n"], "observed_t_n": store.observed[i["content"]]}
        for i in store.images
    ]
    return {
        "fingerprint": {**marks, "latent": {**marks["latent"], "t_n": t_m}},
        "shard_size": shard_size,
        "images": images,
        "restored": [*store.rounds, link],
    }


def reconcile_restored_plan(output: Path, wanted: dict) -> dict:
    """The plan to follow: the stored one if it agrees, so that an interrupted round goes on, else the wanted one.

    Raises:
        StoreError: a store of something else, or a damaged one.
    """
    path = output / "plan.json"
    if not path.exists():
        if next(output.glob("latents-*.safetensors"), None) is not None:
            raise StoreError(f"{output} holds latents but no plan.json, so what they are can't be told; use another folder")
        return wanted
    try:
        stored = read_json(path)
        found = compare(stored, wanted)
        for number, (old, new) in enumerate(zip(rounds(stored), rounds(wanted), strict=True), 1):
            # Another version of the software goes on, since what it is started with is recorded.
            old, new = ({k: v for k, v in link.items() if k != "versions"} for link in (old, new))
            found += differences(old, new, f"round {number}: ")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged, or of another number of rounds ({error}); use another folder") from None
    if found:
        raise StoreError(f"the store {output} is of something else ({'; '.join(found)}); use another folder")
    return {**wanted, "shard_size": stored["shard_size"], "restored": stored["restored"]}


def decide(options: LoopOptions, store: LatentStore, schedule: NoiseSchedule, processes: int, log) -> dict:
    """Check everything, and give the plan to follow, which is then on disk. The main process calls it.

    Raises:
        StoreError, ModelError, InterchangeError, CheckpointError: with one line that says what is wrong.
    """
    if not any(lowered(i, options.t_n) for i in store.images):
        raise StoreError(
            f"--t_n: {options.t_n} is not below the level of any image in {store.folder}, t_n = {format_store_levels(store)}"
        )
    info = told(options)
    foreign = check_history(options, store, info)
    check_base(options, store, schedule, info)
    if foreign:
        log(f"warning: --{options.model[0]} {seen_besides(info, store)}, and --allow_foreign_model lets it restore")
    link = make_link(options, store, info, foreign)
    size = max(1, min(store.manifest["shard_size"], -(-len(store) // processes)))
    plan = reconcile_restored_plan(Path(options.output_dir), make_plan(store, link, size))
    write_json(Path(options.output_dir) / "plan.json", plan)
    return plan


def decide_on_main(options: LoopOptions, store: LatentStore, schedule: NoiseSchedule, state: PartialState, log) -> dict:
    """:func:`decide`'s plan on every process, or its error."""
    decision: dict = {}
    if state.is_main_process:
        try:
            decision = decide(options, store, schedule, state.num_processes, log)
        except (StoreError, ModelError, InterchangeError, CheckpointError, OSError) as error:
            decision = {"error": str(error)}
    if state.num_processes > 1:
        decision = gather_object([decision])[0]
    if "error" in decision:
        raise StoreError(decision["error"])
    return decision


def restore_store(options: LoopOptions, state: PartialState | None = None, log=print) -> dict:
    """Restore a store, finish an interrupted round, or confirm that the store there is what is asked for. Returns its
    manifest.

    Every process calls it; each restores its own share.

    Raises:
        StoreError, ModelError, InterchangeError, CheckpointError: with one line that says what is wrong.
    """
    state = state or PartialState()
    log = log if state.is_main_process else (lambda message: None)
    output, store = Path(options.output_dir), LatentStore(options.latents_dir)
    check_sdxl(options.pretrained_model_name_or_path, options.revision)
    schedule = load_schedule(options.pretrained_model_name_or_path, options.revision)
    plan = decide_on_main(options, store, schedule, state, log)
    if todo := missing_shards(output, plan, state):
        unet = load_model(options, DTYPES[options.dtype]).to(state.device)
        write_samples(output, todo, RestoredLatentMaker(store, unet, schedule, options), quiet=not state.is_main_process)
    state.wait_for_everyone()
    manifest = {**plan, **counted(store, plan)}
    if state.is_main_process:
        manifest |= share_texts(store, output)
        write_json(output / "manifest.json", manifest)
        counts = manifest["counts"]
        log(
            f"{output}: {counts['restored']} images restored to t_n = {options.t_n}; {counts['taken_over']} at or below it "
            f"and {counts['clean']} clean ones taken over as they were"
        )
    state.wait_for_everyone()
    return manifest


def counted(store: LatentStore, plan: dict) -> dict:
    """What the manifest says beside the plan. Names of files that a first store skipped are in that one's alone."""
    clean = sum(i["t_n"] is None for i in plan["images"])
    restored = plan["restored"][-1]["images_restored"]
    own = {"skipped": 0, "restored": restored, "taken_over": len(plan["images"]) - restored - clean, "clean": clean}
    return {"counts": {**store.manifest["counts"], **own}, "skipped": [], "near_duplicates": None, "versions": versions()}
