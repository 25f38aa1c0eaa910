"""Train the miniature: an SDXL-architecture pipeline under 25 MB that draws Noto emoji from their names.

    npm pack emoji-datasource-google@16.0.0
    python -m benchmarks.train_miniature --archive emoji-datasource-google-16.0.0.tgz \
        --bpe_merges bpe_simple_vocab_16e6.txt.gz

Stages, each resumable and each reading what the one before it left in --work_dir or --output_dir:

    data      archive => output_dir/data/{pretrain,finetune,heldout}/
    vae       pretrain pictures => work_dir/vae.pt
    unet      pretrain latents and captions => work_dir/unet.pt   (UNet and both text encoders, jointly)
    assemble  the weights so far => output_dir/pipeline/          (may be run at any time, for a look at a run)
    grid      pipeline => a picture of samples

Only pre-training images are trained on; the held-out ones are read for the figures in the log, the fine-tuning ones
not at all. So small a set is learnt by heart unless that is made hard. Half of the pictures that the UNet sees are
random crops of enlarged ones, and the time ids say so: crops (0, 0) still asks for whole pictures. In half of the
captions, words are replaced at random by any of the vocabulary, whose embeddings stay as they were drawn: a word that
was never taught then says nothing, instead of naming some other picture with confidence. Every random draw is a
function of (seed, step), so an interrupted run repeats nothing and loses nothing but the steps since its last
checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

import torch

from benchmarks.miniature import data as miniature_data
from benchmarks.miniature import models as miniature_models
from benchmarks.miniature.training import TrainingRun, load_state
from benchmarks.miniature.unet import STATE_FILE, UnetSettings, train_unet
from benchmarks.miniature.vae import train_vae, trained_vae

STAGES = ("data", "vae", "unet", "assemble", "grid")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, help="emoji-datasource-google-16.0.0.tgz from `npm pack`")
    parser.add_argument("--bpe_merges", type=Path, help="OpenAI's bpe_simple_vocab_16e6.txt.gz, as open_clip ships it")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/miniature"))
    parser.add_argument("--output_dir", type=Path, default=Path("miniature"))
    parser.add_argument("--grid", type=Path, default=Path("docs/images/miniature.png"))
    parser.add_argument("--vae_steps", type=int, default=6000)
    parser.add_argument("--vae_batch_size", type=int, default=64)
    parser.add_argument("--vae_learning_rate", type=float, default=2e-3)
    parser.add_argument("--unet_steps", type=int, default=15000)
    parser.add_argument("--unet_batch_size", type=int, default=256)
    parser.add_argument("--unet_learning_rate", type=float, default=1e-3)
    parser.add_argument("--max_loss_weight", type=float, default=20.0, help="cap of the weight 1 / abar_t; 1: plain loss")
    parser.add_argument("--crops", type=int, default=16, help="random crops made of each picture")
    parser.add_argument("--dropout", type=float, default=0.1, help="dropout in the UNet while it is trained")
    parser.add_argument("--word_replacement", type=float, default=0.5, help="share of captions with random words in them")
    parser.add_argument("--start_from", type=Path, help="a pipeline folder whose denoiser the UNet's training starts from")
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--logging_steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    for stage, needs in (("data", "archive"), ("assemble", "bpe_merges")):
        path = getattr(args, needs)
        if args.stage in (stage, "all") and path is None:
            parser.error(f"--stage {args.stage} needs --{needs}")
        if path is not None and not path.is_file():
            parser.error(f"--{needs} {path}: no such file")
    return args


def make_data(archive: Path, folder: Path) -> None:
    """Write the splits of an archive to folder/{pretrain,finetune,heldout}/."""
    parts = miniature_data.split(miniature_data.read_archive(archive))
    miniature_data.write_imagefolders(parts, folder)
    print({name: len(members) for name, members in parts.items()})


def assemble(work_dir: Path, output_dir: Path, bpe_merges: Path, device: str, seed: int) -> None:
    """Write output_dir/pipeline/ from the averaged weights so far, and the log beside it."""
    modules = miniature_models.build_denoiser(seed)
    state = load_state(work_dir / STATE_FILE)
    if state:
        modules.load_state_dict(state["average"])
    new, final = output_dir / "pipeline.new", output_dir / "pipeline"
    shutil.rmtree(new, ignore_errors=True)
    tokenizers = miniature_models.build_tokenizers(bpe_merges)
    miniature_models.save_pipeline(new, trained_vae(work_dir, device).cpu(), modules, tokenizers)
    if final.exists():  # two renames, so that a reader never meets half a pipeline
        final.rename(output_dir / "pipeline.old")
    new.rename(final)
    shutil.rmtree(output_dir / "pipeline.old", ignore_errors=True)
    logs = [work_dir / f"{stage}_log.jsonl" for stage in ("vae", "unet")]
    (output_dir / "train_log.jsonl").write_text("".join(p.read_text() for p in logs if p.exists()))
    size = miniature_models.folder_bytes(final) / 1e6
    print(f"{final}: {size:.1f} MB after {state['step'] if state else 0} steps")


def draw_grid(miniature: Path, path: Path, seed: int) -> None:
    """Samples of miniature/pipeline beside the real pictures: captions it was trained on, then ones it never saw."""
    from benchmarks.miniature.grid import grid  # takes matplotlib, which the other stages don't need

    path.parent.mkdir(parents=True, exist_ok=True)
    grid(miniature, path, seed=seed)
    print(path)


def training_run(args: argparse.Namespace, steps: int, batch_size: int, learning_rate: float) -> TrainingRun:
    return TrainingRun(
        work_dir=args.work_dir,
        output_dir=args.output_dir,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        checkpointing_steps=args.checkpointing_steps,
        logging_steps=args.logging_steps,
        seed=args.seed,
        device=args.device,
    )


def run_stage(stage: str, args: argparse.Namespace) -> None:
    if stage == "data":
        make_data(args.archive, args.output_dir / "data")
    elif stage == "vae":
        train_vae(training_run(args, args.vae_steps, args.vae_batch_size, args.vae_learning_rate))
    elif stage == "unet":
        run = training_run(args, args.unet_steps, args.unet_batch_size, args.unet_learning_rate)
        names = [f.name for f in dataclasses.fields(UnetSettings)]
        train_unet(run, UnetSettings(**{name: getattr(args, name) for name in names}))
    elif stage == "assemble":
        assemble(args.work_dir, args.output_dir, args.bpe_merges, args.device, args.seed)
    else:
        draw_grid(args.output_dir, args.grid, args.seed)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")  # TF32 where the device has it
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        run_stage(stage, args)


if __name__ == "__main__":
    main()
