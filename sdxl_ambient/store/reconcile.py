"""What is wanted against what is there: the plan to follow, or why nothing may be drawn.

A store grows: added pictures come into new shards, removed ones leave the plan and their shard, and the rest stays as it is.
What can't be one more picture on the same noise paths is refused: other settings, another level of a picture, other noise of
it in another store.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdxl_ambient.errors import StoreError
from sdxl_ambient.home import check_home
from sdxl_ambient.images.sources import Log
from sdxl_ambient.provenance import differences, read_json, write_sealed
from sdxl_ambient.store.keys import NoiseKey
from sdxl_ambient.store.lineage import lineage_of, observed_levels, restored_levels
from sdxl_ambient.store.plan import TOKENS, latent_hash_of, place, shard_number, shards
from sdxl_ambient.store.records import Plan
from sdxl_ambient.store.register import Conflict, Observation, open_register
from sdxl_ambient.store.shards import read_mark, remove_mark, write_mark
from sdxl_ambient.store.validate import read_manifest, read_plan

SECOND = (
    "Each independent draw of the noise is one more observation of the same picture, and their average has less noise than "
    "t_n promises"
)
_SHARDS = "latents-*.safetensors"
_IN_RUNS = "latents"  # what a training run calls its store


def compare(stored: Plan, wanted: Plan) -> list[str]:
    """In what a stored plan differs from a wanted one so that its latents can't be gone on with.

    Captions can change without a new draw, and pictures may be more or fewer while some are the same.
    """
    differing = differences(stored["fingerprint"], wanted["fingerprint"])
    have, want = ({i["content"]: i["t_n"] for i in plan["images"]} for plan in (stored, wanted))
    both = have.keys() & want.keys()
    if not both:
        differing.append(f"images: none of the {len(want)} is among the {len(have)} in the store")
    moved = [c for c in sorted(both) if have[c] != want[c]]
    if moved:
        levels = f"stored {have[moved[0]]}, wanted {want[moved[0]]}"
        differing.append(f"noise levels: {len(moved)} images have another t_n, the first: {levels}")
    return differing


def reconcile_plan(output_dir: Path, wanted: Plan, key: NoiseKey | None, size: int, allowed: bool, log: Log) -> Plan:
    """The plan to follow, which is then on disk, with its observations in the register.

    Args:
        key: of the noise; None where nothing is drawn, since the latents are noisy already.
        size: pictures per new shard.
        allowed: whether a second observation is.

    Raises:
        StoreError: naming what differs, or the earlier store of the same pictures.
        RegisterError: the register of observations is lost or damaged.
    """
    check_home(output_dir)
    stored = read_plan(output_dir)
    if stored is not None and lineage_of(stored):
        # Whatever is allowed: a draw of noise would replace the samples that the lineage describes.
        raise StoreError(f"{output_dir} holds restored samples, and no noise is drawn into it; use another folder")
    if stored is None and any(output_dir.glob(_SHARDS)):
        raise StoreError(f"{output_dir} holds latents but no plan.json, so what they are can't be told; use another folder")
    if stored is not None and (differing := compare(stored, wanted)):
        what = "; ".join(differing)
        if not allowed:
            raise StoreError(
                f"the store {output_dir} is of something else ({what}). Use another folder, or give "
                "--allow_second_observation to draw it anew"
            )
        log(f"warning: the store {output_dir} differs ({what}) and is drawn anew. {SECOND}")
        remove_store(output_dir)
        stored = None
    if stored is not None:
        check_lost(output_dir, stored, key, log)
    plan = new_plan(wanted, key, size) if stored is None else grown_plan(output_dir, stored, wanted, key, size, log)
    if key is None or not observations_of(plan):
        _write(output_dir, plan, stored)
    else:
        announce(output_dir, plan, stored, key, allowed, log)
    return plan


def new_plan(wanted: Plan, key: NoiseKey | None, size: int) -> Plan:
    """The plan of a store that is not there yet."""
    images = place(wanted["images"], size)
    return {**wanted, "images": images, "key_id": key.id if key else None, "store_id": uuid.uuid4().hex}


def grown_plan(output_dir: Path, stored: Plan, wanted: Plan, key: NoiseKey | None, size: int, log: Log) -> Plan:
    """The wanted pictures, those that are stored in the shards that they have, the others in new ones."""
    known = {i["content"]: i["shard"] for i in stored["images"]}  # pyright: ignore[reportTypedDictNotRequiredAccess]
    taken = [n for n in map(shard_number, [*known.values(), *(p.name for p in output_dir.glob(_SHARDS))]) if n is not None]
    images = place(wanted["images"], size, known, first=max(taken, default=-1) + 1)
    plan: Plan = {**stored, "images": images}
    now, before = ({i["content"] for i in one["images"]} for one in (plan, stored))
    added, removed = now - before, before - now
    if added or removed:
        stay = len(images) - len(added)
        log(f"{output_dir}: {len(added)} images are new and {len(removed)} are gone; the other {stay} stay as they are")
    if key is not None and key.id != stored.get("key_id") and (added or undrawn(output_dir, stored)):
        lost = stored.get("key_id") is None
        made = "a key that is kept nowhere" if lost else "another noise key"
        way = "--noise_key none" if lost else "that one"
        raise StoreError(f"the store {output_dir} was made with {made}; go on with {way}, or use another folder")
    return plan


def check_lost(output_dir: Path, stored: Plan, key: NoiseKey | None, log: Log) -> None:
    """Say which shards were drawn and are gone. Raises StoreError where they can't be drawn again with the same noise."""
    known = known_hashes(output_dir, stored)
    lost = [name for name in known if not (output_dir / name).exists()]
    if not lost:
        return
    if key is not None and (key.id is None or key.id != stored.get("key_id")):
        raise StoreError(
            f"{output_dir / lost[0]} is missing, and the key of its noise is not the one of this run; another draw would be "
            "a second observation of its images. Restore the file, or give that key"
        )
    log(f"note: {len(lost)} shards of {output_dir} are missing and are made again, with the same noise: {lost[0]}")


def known_hashes(output_dir: Path, plan: Plan) -> dict[str, dict[str, str]]:
    """The hashes of the shards of latents that were drawn, by file: from the manifest, or from marks before there is one."""
    if (output_dir / "manifest.json").exists():
        hashes = read_manifest(output_dir)["sha256"]
        return {name: one for name, one in hashes.items() if shard_number(name) is not None}
    marks = {name: read_mark(output_dir / name) for name, _ in shards(plan)}
    return {name: mark for name, mark in marks.items() if mark is not None}


def remove_dropped(output_dir: Path, plan: Plan) -> None:
    """Delete the shards of which no picture is in the plan any more."""
    names = {name for name, _ in shards(plan)}
    for path in output_dir.glob(_SHARDS):
        if shard_number(path.name) is not None and path.name not in names:
            path.unlink()
            remove_mark(path)


def undrawn(output_dir: Path, plan: Plan) -> bool:
    """Whether some of a plan's shards were not drawn yet."""
    return any(not (output_dir / name).exists() for name, _ in shards(plan))


def _write(output_dir: Path, plan: Plan, stored: Plan | None) -> None:
    """Put a plan on disk. Where it changes a finished store, that is unfinished from here on, its hashes kept in marks."""
    if stored == plan:
        return
    if (output_dir / "manifest.json").exists():
        for name, hashes in read_manifest(output_dir)["sha256"].items():
            if shard_number(name) is not None and read_mark(output_dir / name) is None:
                write_mark(output_dir / name, hashes)
        (output_dir / "manifest.json").unlink()
    write_sealed(output_dir / "plan.json", plan)


def remove_store(folder: Path) -> None:
    """Delete a store's own files and no others. The plan goes last: latents without it would be taken for another plan's."""
    for path in folder.glob(_SHARDS):
        remove_mark(path)
    for pattern in ("manifest.json", _SHARDS, "latents-*.sha256.json", "prompts-*.safetensors", TOKENS, "plan.json"):
        for path in folder.glob(pattern):
            path.unlink()


# -- observations elsewhere ------------------------------------------------------------------


def announce(output_dir: Path, plan: Plan, stored: Plan | None, key: NoiseKey, allowed: bool, warn: Log) -> None:
    """Put a plan on disk, and enter its observations into the register, before they are drawn.

    It says so where some are second ones, which are allowed. Stores beside this one are looked at as well: somebody else
    may have made them.

    Raises:
        StoreError: other noise of some pictures exists, and that isn't allowed.
    """
    store, folder = plan["store_id"], output_dir.resolve()  # pyright: ignore[reportTypedDictNotRequiredAccess]
    wanted = observations_of(plan)
    with open_register() as register:
        new = register.unannounced(wanted, key_id=key.id, store=store, folder=folder)
        beside = observed_elsewhere(output_dir, plan, new) if new else None
        if beside is not None and not allowed:
            raise StoreError(f"{_beside(*beside)}. {SECOND}. {_WAYS_OUT}")

        def put(conflicts: list[Conflict]) -> None:
            if conflicts or beside:
                plan["second_observation"] = True
            _write(output_dir, plan, stored)

        conflicts = register.add(new, key_id=key.id, store=store, folder=folder, allowed=allowed, before=put)
    messages = [*map(_before, conflicts), *([_beside(*beside)] if beside else [])]
    if conflicts and not allowed:
        raise StoreError(f"{messages[0]}. {SECOND}. {_WAYS_OUT}")
    if messages:
        warn(f"warning: {messages[0]}. {SECOND}; going on, as --allow_second_observation asks")


_WAYS_OUT = "Use that store, or give --allow_second_observation"


def _before(conflict: Conflict) -> str:
    why = "of another VAE, schedule, size or crop" if conflict.other_latent else "made with another key"
    return (
        f"{conflict.pictures} of these images already have a noisy latent in {conflict.folder}, {why}, since "
        f"{conflict.since}"
    )


def _beside(folder: Path, count: int) -> str:
    if restored_levels(folder) is not None:
        return f"{count} of these images were observed before: {folder} holds samples restored from their noisy latents"
    return f"{count} of these images already have a noisy latent in {folder}"


def observations_of(plan: Plan) -> list[Observation]:
    """The observations that a store's latents are, or were restored from; none of pictures that are stored clean."""
    latent, levels = plan["fingerprint"]["latent"], observed_levels(plan)
    if latent.get("pre_noised"):
        return []  # nothing is drawn, and the same content is the same noise
    at = ((entry, levels[entry["content"]]) for entry in plan["images"])
    return [Observation(e["content"], latent_hash_of(latent, e), t_n) for e, t_n in at if t_n is not None]


def observed_elsewhere(output_dir: Path, plan: Plan, new: Sequence[Observation]) -> tuple[Path, int] | None:
    """A noisy store near ``output_dir`` with other noise for ``new`` pictures of this plan: its folder, and how many.

    The same latent under the same kept key is the same noise path, and no second observation at any level. A store of
    restored samples stands for the observations that they were drawn from, which may lie elsewhere or be gone.
    """
    wanted, key_id = {o.content: o.latent for o in new}, plan.get("key_id")
    for path in _plans_near(output_dir.resolve()):
        try:
            other: Plan = read_json(path)
            theirs = {o.content: o.latent for o in observations_of(other)}
            shared = wanted.keys() & theirs.keys()
            first = (lineage_of(other) or [other])[0]  # who knows the key of the observations
            same_key = key_id is not None and first.get("key_id") == key_id
            # Earlier formats drew each level for itself.
            on_path = other["fingerprint"]["format_version"] == plan["fingerprint"]["format_version"]
            same = same_key and on_path and all(theirs[c] == wanted[c] for c in shared)
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            continue  # not one of ours
        if shared and not same:
            return path.parent, len(shared)
    return None


def _plans_near(folder: Path) -> Iterator[Path]:
    """plan.json of the stores beside a folder, and of those in the output folders of runs, where they are called latents."""
    found = set(folder.parent.glob("*/plan.json")) | set(folder.parent.glob(f"*/{_IN_RUNS}/plan.json"))
    if folder.name == _IN_RUNS:
        found |= set(folder.parent.parent.glob(f"*/{_IN_RUNS}/plan.json"))
    return iter(sorted(path for path in found if path.parent != folder))
