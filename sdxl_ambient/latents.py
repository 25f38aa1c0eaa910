"""Image → latent → noisy latent, once: makes a store of noisy latents and prompt embeddings that training reads.

    python -m sdxl_ambient.latents --pretrained_model_name_or_path BASE --train_data_dir DIR --t_n 500 --output_dir STORE

A store is a folder of sharded safetensors:

    plan.json            what will be drawn; written before the first draw
    latents-00000.safetensors …   one tensor (4, h, w) per picture, named by the hash of its pixels
    prompts-<hash>.safetensors …  two tensors per distinct caption: its states and its pooled embedding
    manifest.json        written last; a store without it is unfinished

Every picture is drawn once. Shards that exist are never drawn anew, a store that differs from what is asked for is refused
with the difference named, and a second draw of a picture is refused unless asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from sdxl_ambient.conditioning import encode_prompts, is_truncated
from sdxl_ambient.config import parse_options
from sdxl_ambient.geometry import Geometry
from sdxl_ambient.images import ImagesMissing, list_images, load_rgb
from sdxl_ambient.manifest import atomic, hash_bytes, hash_json, hash_tensors, versions, write_json
from sdxl_ambient.models import Encoders, ModelError, load_encoders, load_schedule
from sdxl_ambient.noise import NoiseSchedule, levels
from sdxl_ambient.observation import NoiseKeyError, draw_z, key_id, noise_key
from sdxl_ambient.plan import StoreError, content_hash, fingerprint, make_plan, scan, settle_plan, shards

PROMPT_BATCH = 16
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


def readable(path: Path, names: Sequence[str]) -> bool:
    """Whether a shard is there with exactly these tensors. A damaged one is a StoreError, not a reason to draw again."""
    if not path.exists():
        return False
    try:
        with safe_open(str(path), "pt") as file:
            if set(file.keys()) == set(names):
                return True
    except (SafetensorError, OSError):
        pass
    raise StoreError(f"{path} is damaged; drawing it anew would be a second observation of its images. Restore the file")


def write_latents(
    output_dir: Path,
    plan: dict,
    paths: dict[str, str],
    encoders: Encoders,
    schedule: NoiseSchedule,
    geometry: Geometry,
    key: bytes,
    state: PartialState,
) -> None:
    """Encode and draw this process's share of the shards that aren't there yet."""
    mine = shards(plan)[state.process_index :: state.num_processes]
    todo = [(n, e) for n, e in mine if not readable(output_dir / n, [i["content"] for i in e])]
    what = hash_json(plan["fingerprint"]["latent"])
    total = sum(len(entries) for _, entries in todo)
    with tqdm(total=total, desc="encoding images", unit="img", disable=not state.is_main_process, mininterval=1) as bar:
        for name, entries in todo:
            tensors = {}
            for entry in entries:
                image = load_rgb(paths[entry["content"]])
                if content_hash(image) != entry["content"]:
                    raise StoreError(f"{paths[entry['content']]} changed while it was being encoded")
                pixels, _ = geometry.apply(image, entry["content"])
                x_0 = encode_image(encoders.vae, pixels)
                t_n = levels(entry["t_n"], 1)
                z = draw_z(key, what, entry["content"], x_0.shape).float()
                tensors[entry["content"]] = schedule.observe(x_0[None], t_n, z[None])[0].contiguous()
                bar.update()
            write_shard(output_dir / name, tensors)


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a shard whole or not at all. A full disk is a StoreError; the shards before it stay."""
    try:
        with atomic(path) as temporary:
            save_file(tensors, str(temporary))
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} can't be written: {error}; the same command goes on from here") from None


def write_prompts(output_dir: Path, captions: dict[str, str], encoders: Encoders, size: int, state: PartialState) -> dict:
    """Embed every distinct caption that no shard holds yet. Returns caption hash → file name, over all processes.

    A shard's name starts with a hash of the text encoders and ends with one of its captions.
    """
    models = hash_json([hash_tensors(e.state_dict()) for e in encoders.text_encoders])[:12]
    where: dict[str, str] = {}
    for path in sorted(output_dir.glob(f"prompts-{models}-*.safetensors")):
        try:
            with safe_open(str(path), "pt") as file:
                where.update({k.split(".")[0]: path.name for k in file.keys()})
        except SafetensorError:
            continue  # damaged; its captions are embedded again, which draws nothing
    state.wait_for_everyone()  # all see the same files before anyone adds one
    missing = sorted(set(captions) - set(where))
    size = max(1, min(size, -(-len(missing) // state.num_processes)))
    groups = [missing[i : i + size] for i in range(0, len(missing), size)]
    names = [f"prompts-{models}-{hash_json(g)[:16]}.safetensors" for g in groups]
    with tqdm(total=len(missing), desc="embedding captions", unit="caption", disable=not state.is_main_process) as bar:
        for name, group in list(zip(names, groups, strict=True))[state.process_index :: state.num_processes]:
            tensors = {}
            for i in range(0, len(group), PROMPT_BATCH):
                keys = group[i : i + PROMPT_BATCH]
                embeds, pooled = encode_prompts([captions[k] for k in keys], encoders.tokenizers, encoders.text_encoders)
                for j, k in enumerate(keys):
                    tensors[f"{k}.embeds"] = embeds[j].cpu().contiguous().clone()
                    tensors[f"{k}.pooled"] = pooled[j].cpu().contiguous().clone()
                bar.update(len(keys) * state.num_processes)
            if not all(bool(torch.isfinite(v).all()) for v in tensors.values()):
                raise ModelError("the text encoders give values that are not finite; their weights are damaged")
            write_shard(output_dir / name, tensors)
    where.update({k: name for name, group in zip(names, groups, strict=True) for k in group})
    return {k: where[k] for k in captions}


def build_store(
    train_data_dir: str | Path,
    output_dir: str | Path,
    encoders: Encoders,
    schedule: NoiseSchedule,
    geometry: Geometry,
    *,
    t_n: int | None,
    caption_column: str = "text",
    instance_prompt: str | None = None,
    noise_key_file: str | None = None,
    allow_second_observation: bool = False,
    shard_size: int = 256,
    state: PartialState | None = None,
    say=print,
) -> dict:
    """Make a store, finish an interrupted one, or confirm that the one there is what is asked for. Returns its manifest.

    Every process calls it; each encodes its own share.

    Raises:
        ImagesMissing, StoreError, NoiseKeyError, ModelError: with one line that says what is wrong.
    """
    state = state or PartialState()
    output_dir = Path(output_dir)
    say = say if state.is_main_process else (lambda message: None)
    check_resolution(geometry.resolution, encoders.vae)
    records = list_images(train_data_dir, caption_column)
    pictures, skipped = scan(records, instance_prompt, state)
    report_skipped(skipped, len(records), say)
    if not pictures:
        raise ImagesMissing(
            f"none of the {len(records)} images in {str(train_data_dir)!r} can be used: {skipped[0]['reason']}"
        )
    even = -(-len({p.content for p in pictures}) // state.num_processes)
    wanted = make_plan(fingerprint(encoders, schedule, geometry, t_n), pictures, geometry, max(1, min(shard_size, even)))
    key = make_key(noise_key_file, state)
    wanted["key_id"] = key_id(key) if noise_key_file is not None else None
    plan = settle_on_main(output_dir, wanted, allow_second_observation, say, state)
    if t_n is None:
        say(f"note: t_n is none, so {output_dir} holds clean latents, which decode to the images")
    write_latents(output_dir, plan, {p.content: p.path for p in pictures}, encoders, schedule, geometry, key, state)
    captions = {hash_bytes(p.caption.encode()): p.caption for p in pictures}
    where = write_prompts(output_dir, captions, encoders, shard_size, state)
    state.wait_for_everyone()
    truncated = sum(is_truncated(c, encoders.tokenizers[0]) for c in captions.values())
    if truncated:
        say(f"note: {truncated} of {len(captions)} captions are longer than the text encoders read and were cut")
    manifest = {
        **plan,
        "prompts": where,
        "counts": {
            "files": len(records),
            "images": len(plan["images"]),
            "exact_duplicates": len(pictures) - len(plan["images"]),
            "captions": len(captions),
            "captions_cut": truncated,
            "skipped": len(skipped),
        },
        "skipped": skipped,
        "versions": versions(),
    }
    if state.is_main_process:
        write_json(output_dir / "manifest.json", manifest)
        counts = manifest["counts"]
        say(f"{output_dir}: {counts['images']} images, {counts['captions']} captions, {counts['skipped']} skipped")
    state.wait_for_everyone()
    return manifest


def check_resolution(resolution: int, vae) -> None:
    """The side must be a multiple of the VAE's factor times what the UNet halves twice (8 × 4 = 32 pixels for SDXL)."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if resolution % (factor * 4):
        raise ModelError(f"--resolution: {resolution} is not a multiple of {factor * 4}, which this model needs")


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


def main(argv: list[str] | None = None) -> int:
    from sdxl_ambient.options import LatentsOptions

    options = parse_options(LatentsOptions, argv, prog="sdxl_ambient.latents", description=__doc__)
    # Without a word on the CPU, PartialState leaves processes that torchrun started there unaware of each other.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU", not torch.cuda.is_available()))
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
