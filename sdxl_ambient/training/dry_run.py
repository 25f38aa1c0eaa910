"""What a run would do, found out without training: counts, sizes, memory, and the first batch as the network will see it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from PIL import Image

from sdxl_ambient.images.folder import ledger_line
from sdxl_ambient.images.geometry import bucket_counts
from sdxl_ambient.models.denoiser import Denoiser
from sdxl_ambient.models.vae import decode_latents, load_vae
from sdxl_ambient.objective import ExtraRows, ambient_objective
from sdxl_ambient.provenance import atomic, write_json
from sdxl_ambient.randomness import sample_generator
from sdxl_ambient.store.batches import Batch, loader
from sdxl_ambient.store.checks import format_store_levels
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.training.memory import estimate
from sdxl_ambient.training.optimizers import parse_extra
from sdxl_ambient.training.run import Run
from sdxl_ambient.training.weights import BaseModel

RECORD, PICTURE = "dry_run.json", "dry_run.png"
GIB = 2**30


@dataclass(frozen=True)
class DryRunSettings:
    """What a run's memory depends on beside the run itself, and whose VAE shows the first batch.

    extra_rows: rows of a forward pass that ``--low_noise`` adds. replace_noisy: whether they take the noisy ones' place.
    optimizer: its name, whichever option says so. optimizer_args, offload_ema: as the options of these names.
    """

    base: BaseModel
    extra_rows: int
    replace_noisy: bool
    optimizer: str
    optimizer_args: list[str]
    offload_ema: bool


def dry_run(run: Run, first: int, settings: DryRunSettings) -> dict:
    """Report what would be trained in ``dry_run.json``, and the first batch's noisy latents, decoded, in ``dry_run.png``.

    Nothing clean is shown: the picture is what whoever has the store can see too. ``first``: steps that are done already.
    """
    base, accelerator, store = settings.base, run.accelerator, run.data.store
    batch = next(iter(loader(store, run.stream(first))))
    report = {
        "steps": run.max_train_steps,
        "samples_per_step": run.samples_per_step,
        "epochs": run.max_train_steps * run.samples_per_step / len(store),
        "trained": run.model.trained,
        **of_the_store(store),
        "first_batch": first_batch(store, batch),
        "memory": memory(run, batch, settings),
    }
    if accelerator.is_main_process:
        write_json(run.output / RECORD, report)
        vae = load_vae(
            base.pretrained_model_name_or_path,
            base.pretrained_vae_model_name_or_path,
            revision=base.revision,
            variant=base.variant,
        ).to(accelerator.device)
        with atomic(run.output / PICTURE) as temporary:
            contact_sheet(vae, batch.x_n).save(temporary)
    for line in summary_lines(report):
        accelerator.print(line)
    accelerator.print(f"Nothing was trained. {run.output / RECORD} and {PICTURE} have the rest.")
    accelerator.wait_for_everyone()
    return report


def of_the_store(store: LatentStore) -> dict:
    """Counts of a store: pictures, captions, what was left out, sizes in pixels, noise levels."""
    manifest = store.manifest
    levels = Counter("clean" if i["t_n"] is None else str(i["t_n"]) for i in store.images)
    return {
        "store": str(store.folder),
        "counts": manifest["counts"],
        "skipped": manifest["skipped"],
        "ledger": manifest.get("ledger"),
        "near_duplicates": manifest.get("near_duplicates") or [],
        "sizes": [{"height": h, "width": w, "images": n} for (h, w), n in sorted(bucket_counts(store.images).items())],
        "t_n": dict(sorted(levels.items())),
        "levels": format_store_levels(store),
    }


def first_batch(store: LatentStore, batch: Batch) -> list[dict]:
    """What the first batch of the main process holds, a row per sample."""
    rows = zip(batch.contents, batch.t_n.tolist(), batch.conditioning.time_ids.int().tolist(), strict=True)
    shown = zip(batch.dropped.tolist(), batch.flipped.tolist(), strict=True)
    return [
        {"content": content, "t_n": t_n, "time_ids": ids, "without_caption": dropped, "mirrored": flipped}
        for (content, t_n, ids), (dropped, flipped) in zip(rows, shown, strict=True)
    ]


def memory(run: Run, batch: Batch, settings: DryRunSettings) -> dict[str, int]:
    """Bytes of one process, part by part; activations are counted in one real forward pass."""
    model, device, seed = run.model, run.accelerator.device, run.settings.seed
    rows = settings.extra_rows
    more = [i % len(batch.x_n) for i in range(rows)]  # as many rows of some pictures as --low_noise adds

    def forward() -> torch.Tensor:
        conditioning, generators, extra = model.conditioning(batch, device), batch.generators(seed), None
        x_n, t_n = batch.x_n.to(device), batch.t_n
        if rows:
            extra = ExtraRows(x_n[more], t_n[more].clamp(min=0))
            if settings.replace_noisy:
                conditioning, x_n, t_n, generators = conditioning.rows(more), x_n[:0], t_n[:0], []
            else:
                conditioning = conditioning.followed_by(conditioning.rows(more))
            generators += [sample_generator(seed, "dry run", i) for i in range(rows)]
        denoise = Denoiser(model.unet, conditioning, model.dtype)
        with run.accelerator.autocast():
            return ambient_objective(denoise, run.data.schedule, x_n, t_n, generators, run.objective, extra).total

    return estimate(
        model.modules,
        forward=forward,
        optimizer=settings.optimizer,
        extra=parse_extra(settings.optimizer_args),
        fused_backward_pass=run.settings.fused_backward_pass,
        use_ema=run.settings.use_ema,
        offload_ema=settings.offload_ema,
    )


def contact_sheet(vae, x_n: torch.Tensor, columns: int = 4, most: int = 16) -> Image.Image:
    """Noisy latents (n, 4, h, w) decoded one by one, side by side."""
    pictures = []
    for one in x_n[:most]:
        pixels = decode_latents(vae, one[None].to(vae.device))[0].clamp(-1, 1)
        array = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        pictures.append(Image.fromarray(array))
    width, height = pictures[0].size
    columns = min(columns, len(pictures))
    sheet = Image.new("RGB", (width * columns, height * -(-len(pictures) // columns)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def summary_lines(report: dict) -> list[str]:
    """The report's main points, a line each."""
    counts, parts = report["counts"], report["memory"]
    sizes = ", ".join(f"{s['height']}x{s['width']}: {s['images']}" for s in report["sizes"])
    spent = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size and name != "total")
    ledger = report["ledger"]
    files = [ledger_line(ledger)] if ledger and ledger["files"] else []
    return [
        *files,
        f"Images: {counts['images']} at {report['levels']}, {counts['captions']} captions, {counts['skipped']} skipped, "
        f"{counts['exact_duplicates']} exact duplicates, {len(report['near_duplicates'])} near-duplicates",
        f"Sizes (height x width in pixels: images): {sizes}",
        f"Steps: {report['steps']} of {report['samples_per_step']} samples, {report['epochs']:.1f} epochs",
        f"Memory of one process, GiB: {parts['total'] / GIB:.2f} ({spent}), without the framework's own",
    ]
