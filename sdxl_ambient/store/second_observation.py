"""What speaks against drawing noise: a store of something else, or another draw of the same pictures."""

from __future__ import annotations

from pathlib import Path

from sdxl_ambient.errors import StoreError
from sdxl_ambient.images.sources import Log
from sdxl_ambient.provenance import differences, read_json
from sdxl_ambient.store.lineage import lineage_of, observed_levels, restored_levels
from sdxl_ambient.store.plan import TOKENS
from sdxl_ambient.store.records import Plan


def compare(stored: Plan, wanted: Plan) -> list[str]:
    """In what a stored plan differs from a wanted one, captions aside (they can change without a new draw)."""
    differing = differences(stored["fingerprint"], wanted["fingerprint"])
    have, want = ({i["content"]: i["t_n"] for i in plan["images"]} for plan in (stored, wanted))
    if have.keys() != want.keys():
        more, less = want.keys() - have.keys(), have.keys() - want.keys()
        differing.append(f"images: {len(more)} are not in the store, {len(less)} are in the store only")
    moved = [c for c in sorted(have.keys() & want.keys()) if have[c] != want[c]]
    if moved:
        levels = f"stored {have[moved[0]]}, wanted {want[moved[0]]}"
        differing.append(f"noise levels: {len(moved)} images have another t_n, the first: {levels}")
    return differing


def observed_elsewhere(output_dir: Path, plan: Plan) -> tuple[Path, int] | None:
    """Another noisy store beside ``output_dir`` with other noise for pictures of this plan: its folder, and how many.

    The same settings and noise levels under the same key file are the same noise, and no second observation. A store of
    restored samples stands for the observations that they were drawn from, which may lie elsewhere or be gone.
    """
    wanted, key_id = _noisy(plan), plan.get("key_id")
    for path in sorted(output_dir.resolve().parent.glob("*/plan.json")):
        if path.parent == output_dir.resolve():
            continue
        try:
            other: Plan = read_json(path)
            theirs = _noisy(other)
            shared = wanted.keys() & theirs.keys()
            first = (lineage_of(other) or [other])[0]  # who knows the key of the observations
            same_key = key_id is not None and first.get("key_id") == key_id
            rebuild = same_key and _settings(other) == _settings(plan) and all(theirs[c] == wanted[c] for c in shared)
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            continue  # not one of ours
        if shared and not rebuild:
            return path.parent, len(shared)
    return None


def _noisy(plan: Plan) -> dict[str, int]:
    """Noise levels that a plan's pictures are observed at, those that are stored clean left out."""
    return {content: t_n for content, t_n in observed_levels(plan).items() if t_n is not None}


def _settings(plan: Plan) -> dict[str, object]:
    """What shapes the latents beside the noise level, which each picture has for itself."""
    return {name: value for name, value in plan["fingerprint"]["latent"].items() if name != "t_n"}


SECOND = (
    "Each independent draw of the noise is one more observation of the same picture, and their average has less noise than "
    "t_n promises"
)


def check_first_observation(output_dir: Path, plan: Plan, allowed: bool, warn: Log) -> None:
    """Refuse to draw noise for pictures of which a neighbouring store already holds another draw."""
    if plan["fingerprint"]["latent"].get("pre_noised"):
        return  # nothing is drawn, and the same content is the same noise
    other = observed_elsewhere(output_dir, plan)
    if other is None:
        return
    folder, count = other
    message, use = f"{count} of these images already have a noisy latent in {folder}", "Use that store"
    if restored_levels(folder) is not None:
        message = f"{count} of these images were observed before: {folder} holds samples restored from their noisy latents"
        use = "Use the store of those latents"
    message = f"{message}. {SECOND}"
    if not allowed:
        raise StoreError(f"{message}. {use}, or give --allow_second_observation")
    warn(f"warning: {message}; going on, as --allow_second_observation asks")


def remove_store(folder: Path) -> None:
    """Delete a store's own files and no others. The plan goes last: latents without it would be taken for another plan's."""
    for pattern in ("manifest.json", "latents-*.safetensors", "prompts-*.safetensors", TOKENS, "plan.json"):
        for path in folder.glob(pattern):
            path.unlink()


def reconcile_plan(output_dir: Path, wanted: Plan, allowed: bool, warn: Log) -> Plan:
    """The plan to follow: the stored one if it agrees, else the wanted one; a store that differs is refused.

    Raises:
        StoreError: naming what differs.
    """
    path = output_dir / "plan.json"
    if path.exists():
        try:
            stored: Plan = read_json(path)
            restored = bool(lineage_of(stored))
            differing = compare(stored, wanted)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path} is damaged ({error}); what the store holds can't be told. Restore the file") from None
        if restored:
            # Whatever is allowed: a draw of noise would replace the samples that the lineage describes.
            raise StoreError(f"{output_dir} holds restored samples, and no noise is drawn into it; use another folder")
        if not differing:
            # The shards keep their layout; captions are the wanted ones. A store of several keys has no id.
            key_id = wanted.get("key_id") if stored.get("key_id") == wanted.get("key_id") else None
            return {**wanted, "shard_size": stored["shard_size"], "key_id": key_id}
        if not allowed:
            raise StoreError(
                f"the store {output_dir} is of something else ({'; '.join(differing)}). Use another folder, or give "
                "--allow_second_observation to draw it anew"
            )
        warn(f"warning: the store {output_dir} differs ({'; '.join(differing)}) and is drawn anew. {SECOND}")
        remove_store(output_dir)
    elif any(output_dir.glob("latents-*.safetensors")):
        raise StoreError(f"{output_dir} holds latents but no plan.json, so what they are can't be told; use another folder")
    else:
        check_first_observation(output_dir, wanted, allowed, warn)
    return wanted
