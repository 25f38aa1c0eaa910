"""Image → latent → noisy latent, once: makes a store of noisy latents and prompt embeddings that training reads.

    python -m sdxl_ambient.latents --pretrained_model_name_or_path BASE --train_data_dir DIR --t_n 500 --output_dir STORE

A store is a folder of sharded safetensors:

    plan.json            what will be drawn; written before the first draw
    latents-00000.safetensors …   one tensor (4, h, w) per picture, named by the hash of its pixels
    prompts-<hash>.safetensors …  two tensors per distinct caption and the empty one: its states and its pooled embedding
    tokens.safetensors   where text encoders are trained: one tensor (2, 77) per caption, its tokens for each of the two
    manifest.json        written last; a store without it is unfinished

With --pre_noised the latents come from files that are noisy already (:mod:`sdxl_ambient.prenoised`); nothing is drawn.

Every picture is drawn once. Shards that exist are never drawn anew, a store that differs from what is asked for is refused
with the difference named, and a second draw of a picture is refused unless asked for.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from tqdm import tqdm

from sdxl_ambient.config import parse_options
from sdxl_ambient.geometry import Geometry
from sdxl_ambient.images import ImageError, ImagesMissing, Record, load_rgb
from sdxl_ambient.manifest import hash_json, versions, write_json
from sdxl_ambient.models import Encoders, ModelError, load_encoders, load_schedule
from sdxl_ambient.noise import NoiseSchedule, levels
from sdxl_ambient.observation import NoiseKeyError, draw_z, key_id, noise_key
from sdxl_ambient.plan import (
    StoreError,
    content_hash,
    fingerprint,
    look,
    look_closely,
    make_plan,
    plan_of,
    refuse_restored,
    scan,
    settle_plan,
    shards,
)
from sdxl_ambient.prenoised import (
    fingerprint_of_latents,
    ids_of_latent,
    latent_hash,
    list_latents,
    load_latent,
    look_at_latent,
)
from sdxl_ambient.shard_files import readable, write_shard
from sdxl_ambient.sources import open_records
from sdxl_ambient.texts import write_texts
from sdxl_ambient.twins import settle_twins

MAXIMUM_REPORTED = 20


# -- raw pixels => latents ----------------------------------------------------------------------


@torch.no_grad()
def encode_image(vae, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (3, H, W) in [−1, 1] → latent (4, H/8, W/8) as the UNet sees it, float32 on the CPU.

    The mean of the VAE's posterior, not a sample: a draw here would be one more unrecorded observation. One picture at a
    time, since the last bits of a convolution change with the batch.

    Raises:
        ModelError: the VAE gives NaN or infinity.
    """
    latent = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode()
    if not bool(torch.isfinite(latent).all()):
        raise ModelError(f"the VAE gives values that are not finite in {vae.dtype}; its weights are damaged or unsafe")
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        latent = (latent - latent.new_tensor(mean).view(1, -1, 1, 1)) / latent.new_tensor(std).view(1, -1, 1, 1)
    return (latent * vae.config.scaling_factor)[0].float().cpu()


@torch.no_grad()
def decode_latents(vae, latents: torch.Tensor) -> torch.Tensor:
    """Latents (n, 4, h, w) as the UNet sees them → float32 pixels (n, 3, 8h, 8w) in about [−1, 1]."""
    latents = latents / vae.config.scaling_factor
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        latents = latents * latents.new_tensor(std).view(1, -1, 1, 1) + latents.new_tensor(mean).view(1, -1, 1, 1)
    return vae.decode(latents.to(vae.device, vae.dtype)).sample.float()


# -- drawing ----------------------------------------------------------------------


Make = Callable[[dict, Record], torch.Tensor]  # a plan's entry and its record => what the store holds of it


@dataclass(frozen=True)
class Draw:
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


# -- the whole store ----------------------------------------------------------------------


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
    say=print,
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
    say = say if state.is_main_process else (lambda message: None)
    told = dict(caption_column=caption_column, t_n_column=t_n_column, captions_needed=not instance_prompt)
    twins = None
    if train_data_dir is not None:
        refuse_restored("train_data_dir", train_data_dir)
    if pre_noised:
        records = list_latents(train_data_dir, t_n, **told)
        for folder in sorted({record.path.parent for record in records}):
            refuse_restored("train_data_dir", folder)
        pictures, skipped = scan(records, instance_prompt, state, look_at_latent, check)
    else:
        check_geometry(geometry, encoders.vae)
        where = dict(dataset_name=dataset_name, dataset_config_name=dataset_config_name, dataset_split=dataset_split)
        records = open_records(train_data_dir, **where, image_column=image_column, **told, state=state, say=say)
        pictures, skipped = scan(
            records, instance_prompt, state, look if near_duplicates == "ignore" else look_closely, check
        )
        pictures, dropped, twins = settle_twins(pictures, near_duplicates, state, say)
        skipped += dropped
    report_skipped(skipped, len(records), say)
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
    plan = settle_on_main(output_dir, wanted, allow_second_observation, say, state)
    report_clean(plan["images"], output_dir, say)
    make = take if pre_noised else Draw(plan["fingerprint"]["latent"], encoders, schedule, geometry, key)
    write_latents(output_dir, plan, {p.content: p.record for p in reversed(pictures)}, make, state, check)

    texts = write_texts(output_dir, pictures, encoders, shard_size, keep_tokens, state, say, check)
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
        say(f"{output_dir}: {counts['images']} images, {counts['captions']} captions, {counts['skipped']} skipped")
    state.wait_for_everyone()
    return manifest


def check_geometry(geometry: Geometry, vae) -> None:
    """Every size that pictures are cropped to must fit the model. Raises ModelError."""
    check_resolution(geometry.resolution, vae)
    for side in sorted({side for size in geometry.buckets for side in size}):
        check_resolution(side, vae, "aspect_ratio_buckets")


def check_resolution(resolution: int, vae, option: str = "resolution") -> None:
    """The side must be a multiple of the VAE's factor times what the UNet halves twice (8 × 4 = 32 pixels for SDXL)."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if resolution % (factor * 4):
        raise ModelError(f"--{option}: {resolution} is not a multiple of {factor * 4}, which this model needs")


def settle_on_main(output_dir: Path, wanted: dict, allowed: bool, say, state: PartialState) -> dict:
    """The main process looks at the disk, decides and writes the plan; all get its decision, or its error."""
    decision = wanted
    if state.is_main_process:
        try:
            decision = settle_plan(output_dir, wanted, allowed, say)
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


def report_skipped(skipped: list[dict], total: int, say) -> None:
    if not skipped:
        return
    say(f"{len(skipped)} of {total} images are skipped:")
    for entry in skipped[:MAXIMUM_REPORTED]:
        say(f"  {entry['file']}: {entry['reason']}")
    if len(skipped) > MAXIMUM_REPORTED:
        say(f"  … and {len(skipped) - MAXIMUM_REPORTED} more, all listed in manifest.json")


def report_clean(entries: Sequence[dict], output_dir: Path, say) -> None:
    clean = sum(entry["t_n"] is None for entry in entries)
    if clean == len(entries):
        say(f"note: t_n is none, so {output_dir} holds clean latents, which decode to the images")
    elif clean:
        say(
            f"note: {clean} of {len(entries)} images are told to be clean, so {output_dir} holds their clean latents, which "
            "decode to the images"
        )


def processes() -> PartialState:
    """The processes that a command which makes a store was started with."""
    # Without a word on the CPU, PartialState leaves processes that torchrun started there unaware of each other.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU", not torch.cuda.is_available())
    # One process may prepare a data set, or have the larger pictures, for longer than the usual ten minutes.
    return PartialState(cpu=cpu, timeout=datetime.timedelta(hours=6))


def main(argv: list[str] | None = None) -> int:
    from sdxl_ambient.options import LatentsOptions

    options = parse_options(LatentsOptions, argv, prog="sdxl_ambient.latents", description=__doc__)
    state = processes()
    try:
        base = options.pretrained_model_name_or_path
        where = dict(revision=options.revision)
        encoders = load_encoders(base, vae=options.pretrained_vae_model_name_or_path, variant=options.variant, **where)
        build_store(
            options.train_data_dir,
            options.output_dir,
            encoders.to(state.device),
            load_schedule(base, **where),
            options.geometry(),
            **options.of_a_store(),
            state=state,
        )
    except (ImagesMissing, StoreError, NoiseKeyError, ModelError, OSError) as error:
        print(f"sdxl_ambient.latents: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
