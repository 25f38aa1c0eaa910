"""Builds a store: images are read and planned, each is observed once, its captions are embedded, the manifest is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from sdxl_ambient.errors import ImageError, ImagesMissing, StoreError
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.images.load import Record, load_rgb
from sdxl_ambient.images.sources import open_records
from sdxl_ambient.models.load import Encoders
from sdxl_ambient.models.vae import check_geometry, encode_image
from sdxl_ambient.noise import NoiseSchedule, levels
from sdxl_ambient.provenance import hash_json, versions, write_json
from sdxl_ambient.store.deduplicate import handle_near_duplicates
from sdxl_ambient.store.lineage import refuse_restored
from sdxl_ambient.store.observation import draw_z, key_id, noise_key
from sdxl_ambient.store.plan import fingerprint, make_plan, plan_of, shards
from sdxl_ambient.store.prenoised import (
    fingerprint_of_latents,
    ids_of_latent,
    latent_hash,
    list_latents,
    load_latent,
    scan_latent,
)
from sdxl_ambient.store.prompts import write_texts
from sdxl_ambient.store.scan import content_hash, scan, scan_image, scan_image_with_hash
from sdxl_ambient.store.second_observation import reconcile_plan
from sdxl_ambient.store.shards import readable, write_shard

MAXIMUM_REPORTED = 20
Make = Callable[[dict, Record], torch.Tensor]  # a plan's entry and its record => what the store holds of it


@dataclass(frozen=True)
class NoisyLatentMaker:
    """Makes noisy latents of pictures."""

    settings: dict
    encoders: Encoders
    schedule: NoiseSchedule
    geometry: Geometry
    key: bytes

    def __call__(self, entry: dict, record: Record) -> torch.Tensor:
        """One picture's only observation x_n, (4, h, w) float32 on the CPU."""
        image = load_rgb(record.read())
        if content_hash(image) != entry["content"]:
            raise ImageError("changed while it was being encoded")
        pixels, _ = self.geometry.apply(image, entry["content"])
        x_0 = encode_image(self.encoders.vae, pixels)
        # With the picture's own level: the same z at two levels could be solved for the picture.
        what = hash_json({**self.settings, "t_n": entry["t_n"]})
        z = draw_z(self.key, what, entry["content"], x_0.shape).float()
        return self.schedule.observe(x_0[None], levels(entry["t_n"], 1), z[None])[0].contiguous()


def take(entry: dict, record: Record) -> torch.Tensor:
    """A latent that is noisy already, as its file has it."""
    latent = load_latent(record.path)
    if latent_hash(latent) != entry["content"]:
        raise ImageError("changed while it was being read")
    return latent


def write_latents(
    output_dir: Path, plan: dict, records: dict[str, Record], make: Make, state: PartialState, check=lambda: None
) -> None:
    """Make this process's share of the shards that aren't there yet. ``records`` are by content."""
    mine = shards(plan)[state.process_index :: state.num_processes]
    todo = [(n, e) for n, e in mine if not readable(output_dir / n, [i["content"] for i in e])]
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
            write_shard(output_dir / name, tensors)


def build_store(
    train_data_dir: str | Path | None,
    output_dir: str | Path,
    encoders: Encoders,
    schedule: NoiseSchedule,
    geometry: Geometry,
    *,
    t_n: int | None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    dataset_split: str = "train",
    image_column: str = "image",
    caption_column: str = "text",
    t_n_column: str | None = None,
    pre_noised: bool = False,
    instance_prompt: str | None = None,
    near_duplicates: str = "report",
    noise_key_file: str | None = None,
    allow_second_observation: bool = False,
    shard_size: int = 256,
    keep_tokens: bool = False,
    state: PartialState | None = None,
    log=print,
    check: Callable[[], None] = lambda: None,
) -> dict:
    """Make a store, finish an interrupted one, or confirm that the one there is what is asked for. Returns its manifest.

    Every process calls it; each encodes its own share. With ``keep_tokens`` the store holds the captions' tokens, too, which
    training text encoders needs. Without pictures (``pre_noised``) the VAE is not used, nor are geometry, key and
    near-duplicates. ``check`` is called between pictures; what it raises ends the work, and the next call goes on.

    Raises:
        ImagesMissing, StoreError, NoiseKeyError, ModelError: with one line that says what is wrong.
    """
    state = state or PartialState()
    output_dir = Path(output_dir)
    log = log if state.is_main_process else (lambda message: None)
    told = dict(caption_column=caption_column, t_n_column=t_n_column, captions_needed=not instance_prompt)
    twins = None
    if train_data_dir is not None:
        refuse_restored("train_data_dir", train_data_dir)
    if pre_noised:
        records = list_latents(train_data_dir, t_n, **told)
        for folder in sorted({record.path.parent for record in records}):
            refuse_restored("train_data_dir", folder)
        pictures, skipped = scan(records, instance_prompt, state, scan_latent, check)
    else:
        check_geometry(geometry, encoders.vae)
        where = dict(dataset_name=dataset_name, dataset_config_name=dataset_config_name, dataset_split=dataset_split)
        records = open_records(train_data_dir, **where, image_column=image_column, **told, state=state, log=log)
        pictures, skipped = scan(
            records, instance_prompt, state, scan_image if near_duplicates == "ignore" else scan_image_with_hash, check
        )
        pictures, dropped, twins = handle_near_duplicates(pictures, near_duplicates, state, log)
        skipped += dropped
    report_skipped(skipped, len(records), log)
    if not pictures:
        raise ImagesMissing(
            f"none of the {len(records)} images in {str(train_data_dir or dataset_name)!r} can be used: "
            f"{skipped[0]['reason']}"
        )
    size = max(1, min(shard_size, -(-len({p.content for p in pictures}) // state.num_processes)))
    if pre_noised:
        wanted = plan_of(fingerprint_of_latents(encoders, schedule, t_n), pictures, ids_of_latent, size)
    else:
        wanted = make_plan(fingerprint(encoders, schedule, geometry, t_n), pictures, geometry, size)
    key = b"" if pre_noised else make_key(noise_key_file, state)
    wanted["key_id"] = key_id(key) if noise_key_file is not None and not pre_noised else None
    plan = reconcile_on_main(output_dir, wanted, allow_second_observation, log, state)
    report_clean(plan["images"], output_dir, log)
    make = take if pre_noised else NoisyLatentMaker(plan["fingerprint"]["latent"], encoders, schedule, geometry, key)
    write_latents(output_dir, plan, {p.content: p.record for p in reversed(pictures)}, make, state, check)

    texts = write_texts(output_dir, pictures, encoders, shard_size, keep_tokens, state, log, check)
    manifest = {
        **plan,
        **texts,
        "counts": {
            "files": len(records),
            "images": len(plan["images"]),
            "exact_duplicates": len(pictures) - len(plan["images"]),
            **texts["counts"],
            "skipped": len(skipped),
        },
        "skipped": skipped,
        "near_duplicates": twins,
        "versions": versions(),
    }
    if state.is_main_process:
        write_json(output_dir / "manifest.json", manifest)
        counts = manifest["counts"]
        log(f"{output_dir}: {counts['images']} images, {counts['captions']} captions, {counts['skipped']} skipped")
    state.wait_for_everyone()
    return manifest


def reconcile_on_main(output_dir: Path, wanted: dict, allowed: bool, log, state: PartialState) -> dict:
    """The main process looks at the disk, decides and writes the plan; all get its decision, or its error."""
    decision = wanted
    if state.is_main_process:
        try:
            decision = reconcile_plan(output_dir, wanted, allowed, log)
            write_json(output_dir / "plan.json", decision)
        except (StoreError, OSError) as error:
            decision = {"error": str(error)}
    if state.num_processes > 1:
        decision = gather_object([decision])[0]
    if "error" in decision:
        raise StoreError(decision["error"])
    return decision


def make_key(path: str | None, state: PartialState) -> bytes:
    """A random key may differ between processes, as each picture is drawn by one; a key file is made by the main one."""
    if path is not None and not state.is_main_process:
        state.wait_for_everyone()
    key = noise_key(path)
    if path is not None and state.is_main_process:
        state.wait_for_everyone()
    return key


def report_skipped(skipped: list[dict], total: int, log) -> None:
    if not skipped:
        return
    log(f"{len(skipped)} of {total} images are skipped:")
    for entry in skipped[:MAXIMUM_REPORTED]:
        log(f"  {entry['file']}: {entry['reason']}")
    if len(skipped) > MAXIMUM_REPORTED:
        log(f"  … and {len(skipped) - MAXIMUM_REPORTED} more, all listed in manifest.json")


def report_clean(entries: Sequence[dict], output_dir: Path, log) -> None:
    clean = sum(entry["t_n"] is None for entry in entries)
    if clean == len(entries):
        log(f"note: t_n is none, so {output_dir} holds clean latents, which decode to the images")
    elif clean:
        log(
            f"note: {clean} of {len(entries)} images are told to be clean, so {output_dir} holds their clean latents, which "
            "decode to the images"
        )
