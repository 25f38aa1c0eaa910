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
import shutil
import time
from pathlib import Path

import torch

from benchmarks.miniature import data as miniature_data
from benchmarks.miniature import models as miniature_models
from benchmarks.miniature.training import (
    Log,
    batch_indices,
    denoising_loss,
    learning_rate,
    load_state,
    micro_conditioning,
    save_state,
    step_generator,
)
from benchmarks.miniature.vae import encode, train_vae, trained_vae

STAGES = ("data", "vae", "unet", "assemble", "grid")


def parse_args(argv=None):
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


def make_data(args):
    parts = miniature_data.split(miniature_data.read_archive(args.archive))
    miniature_data.write_imagefolders(parts, args.output_dir / "data")
    print({name: len(members) for name, members in parts.items()})


# --------------------------------------------------------------------------------------------- UNet and text encoders


def training_latents(vae, views):
    """float32 latents (2, views, n, 4, 16, 16), scaled, of uint8 views (views, n, 3, 64, 64) and of their mirror images."""
    both = torch.stack([torch.stack([encode(vae, v), encode(vae, v.flip(-1))]) for v in views], dim=1)
    return both * vae.config.scaling_factor


def heldout_loss(unet, text_encoders, alphas_cumprod, latents, ids):
    """Denoising loss on the held-out pictures at evenly spread t and fixed noise; for the log only."""
    t = torch.arange(len(latents)) * 1000 // len(latents)
    t = t[torch.randperm(len(t), generator=step_generator(1, 0))]
    noise = torch.randn(latents.shape, generator=step_generator(2, 0)).to(latents.device)
    states, pooled = miniature_models.encode_prompts(text_encoders, ids)
    return denoising_loss(unet, alphas_cumprod, latents, states, pooled, t.to(latents.device), noise).mean().item()


def draws(args, step, ids):
    """What is random in one step, on args.device.

    ids: the captions' tokens, two tensors (pictures, 77). Returns index, view, flip and t (n,), noise (n, 4, 16, 16),
    caption kept (n,), and the batch's tokens, twice (n, 77).
    """
    generator, n = step_generator(args.seed, step), args.unet_batch_size
    view = torch.randint(1, 1 + max(1, args.crops), (n,), generator=generator)
    view = torch.where(torch.rand(n, generator=generator) < (0.5 if args.crops else 0), view, 0)
    flip = torch.randint(2, (n,), generator=generator)
    t = torch.randint(1000, (n,), generator=generator)
    noise = torch.randn(n, 4, miniature_models.RESOLUTION // 4, miniature_models.RESOLUTION // 4, generator=generator)
    keep = (torch.rand(n, generator=generator) >= args.caption_dropout).float()
    index = batch_indices(len(ids[0]), n, step, args.seed)
    words = replace_words([i[index] for i in ids], args.word_replacement, generator)
    return [x.to(args.device, non_blocking=True) for x in (index, view, flip, t, noise, keep, *words)]


def as_cuda_graph(step, inputs):
    """`step` as one CUDA graph over inputs of these shapes; it is run a few times first, at learning rate zero."""
    held = [x.clone() for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(*held)

    def replay(*inputs):
        for old, new in zip(held, inputs, strict=True):
            old.copy_(new)
        graph.replay()
        return output

    return replay


def replace_words(ids, share, generator):
    """Token ids (two tensors (n, 77)) with random tokens in place of some, the same in both; a `share` of rows is touched.

    In a touched row every token between start and end is replaced with one probability, itself uniform on [0, 1).
    """
    n, length = ids[0].shape
    rate = torch.rand(n, 1, generator=generator) * (torch.rand(n, 1, generator=generator) < share)
    chosen = torch.rand(n, length, generator=generator) < rate
    words = torch.randint(miniature_models.VOCABULARY - 2, (n, length), generator=generator)
    end = (ids[0] == miniature_models.VOCABULARY - 1).int().argmax(1, keepdim=True)
    position = torch.arange(length)
    chosen &= (position > 0) & (position < end)
    return [torch.where(chosen, words, i) for i in ids]


def keep_untaught_words(encoders, ids):
    """Give the embeddings of tokens that no caption holds no gradient; they stay what they were drawn as."""
    for encoder, tokens in zip(encoders, ids, strict=True):
        weight = encoder.get_input_embeddings().weight
        taught = torch.zeros(len(weight), 1, device=weight.device)
        taught[tokens.unique()] = 1
        weight.register_hook(lambda gradient, taught=taught: gradient * taught)


def train_unet(args):
    device, vae = args.device, trained_vae(args)
    tokenizers = miniature_models.build_tokenizers(args.bpe_merges)
    captions, pixels = miniature_data.read_imagefolder(args.output_dir / "data" / "pretrain")
    views, corners = miniature_data.random_crops(pixels, args.crops, args.seed)
    latents, corners = training_latents(vae, views), corners.to(device)
    ids = miniature_models.token_ids(tokenizers, captions)
    heldout_captions, heldout_pixels = miniature_data.read_imagefolder(args.output_dir / "data" / "heldout")
    heldout_ids = [i.to(device) for i in miniature_models.token_ids(tokenizers, heldout_captions)]
    heldout = training_latents(vae, heldout_pixels[None])[0, 0], heldout_ids
    alphas_cumprod = miniature_models.build_scheduler().alphas_cumprod.to(device)

    # Each a ModuleDict of unet, text_encoder and text_encoder_2; the second is the first's exponential moving average.
    modules = miniature_models.build_denoiser(args.seed, args.dropout).to(device).train()
    average = miniature_models.build_denoiser(args.seed).to(device).eval().requires_grad_(False)
    if args.start_from:
        for denoiser in (modules, average):
            miniature_models.load_denoiser(denoiser, args.start_from)
    weights, averaged = list(modules.parameters()), list(average.parameters())
    encoders = modules["text_encoder"], modules["text_encoder_2"]
    # No weight decay on the text encoders: it would erase the embeddings of words that pre-training never sees.
    groups = [
        dict(params=modules["unet"].parameters(), weight_decay=1e-2),
        dict(params=[p for e in encoders for p in e.parameters()], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True, capturable=device == "cuda")
    path, first = args.work_dir / "unet.pt", 0
    if state := load_state(path):
        modules.load_state_dict(state["modules"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    keep_untaught_words(encoders, ids)
    rate = torch.zeros((), device=device)
    for group in optimizer.param_groups:
        group["lr"] = rate

    def train_step(index, view, flip, t, noise, keep, *words):
        """One update from what draws() returns; the batch's plain loss."""
        states, pooled = miniature_models.encode_prompts(encoders, words)
        # Zeros stand for the empty prompt, as force_zeros_for_empty_prompt has it in the pipeline.
        states, pooled = states * keep[:, None, None], pooled * keep[:, None]
        time_ids = micro_conditioning(miniature_data.mirrored(corners[view, index], flip))
        x_0 = latents[flip, view, index]
        losses = denoising_loss(modules["unet"], alphas_cumprod, x_0, states, pooled, t, noise, time_ids)
        # Layout and colour are decided at high noise, where the plain loss is tiny: 1 / abar_t is v-prediction's weight.
        loss = (losses * (1 / alphas_cumprod[t]).clamp(max=args.max_loss_weight)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return losses.detach().mean()

    if device == "cuda":  # so small a network waits for its kernels' launches otherwise
        train_step = as_cuda_graph(train_step, draws(args, first, ids))
    log, losses, start = Log(args.work_dir / "unet_log.jsonl", first), [], time.perf_counter()

    for step in range(first, args.unet_steps):
        rate.fill_(learning_rate(args.unet_learning_rate, step, args.unet_steps, warmup=200))
        torch.manual_seed(args.seed * 1_000_003 + step)  # dropout
        losses.append(train_step(*draws(args, step, ids)).clone())
        decay = min(args.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(averaged, weights, 1 - decay)
        last = step + 1 == args.unet_steps
        if (step + 1) % args.logging_steps == 0 or last:
            record = dict(stage="unet", step=step + 1, loss=torch.stack(losses).mean().item())
            if (step + 1) % (5 * args.logging_steps) == 0 or last:
                average_encoders = average["text_encoder"], average["text_encoder_2"]
                record["heldout_loss"] = heldout_loss(average["unet"], average_encoders, alphas_cumprod, *heldout)
            log(**record, steps_per_second=(step + 1 - first) / (time.perf_counter() - start))
            losses = []
        if (step + 1) % args.checkpointing_steps == 0 or last:
            save_state(
                dict(
                    modules=modules.state_dict(),
                    average=average.state_dict(),
                    optimizer=optimizer.state_dict(),
                    step=step + 1,
                ),
                path,
            )


# -------------------------------------------------------------------------------------------------- pipeline and grid


def assemble(args):
    """Write output_dir/pipeline/ from the averaged weights so far, and the log beside it."""
    modules = miniature_models.build_denoiser(args.seed)
    state = load_state(args.work_dir / "unet.pt")
    if state:
        modules.load_state_dict(state["average"])
    new, final = args.output_dir / "pipeline.new", args.output_dir / "pipeline"
    shutil.rmtree(new, ignore_errors=True)
    tokenizers = miniature_models.build_tokenizers(args.bpe_merges)
    miniature_models.save_pipeline(new, trained_vae(args).cpu(), modules, tokenizers)
    if final.exists():  # two renames, so that a reader never meets half a pipeline
        final.rename(args.output_dir / "pipeline.old")
    new.rename(final)
    shutil.rmtree(args.output_dir / "pipeline.old", ignore_errors=True)
    logs = [args.work_dir / f"{stage}_log.jsonl" for stage in ("vae", "unet")]
    (args.output_dir / "train_log.jsonl").write_text("".join(p.read_text() for p in logs if p.exists()))
    size = miniature_models.folder_bytes(final) / 1e6
    print(f"{final}: {size:.1f} MB after {state['step'] if state else 0} steps")


def draw_grid(args):
    """Samples of output_dir/pipeline beside the real pictures: captions it was trained on, then ones it never saw."""
    from benchmarks.miniature.grid import grid

    args.grid.parent.mkdir(parents=True, exist_ok=True)
    grid(args.output_dir, args.grid, seed=args.seed)
    print(args.grid)


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")  # TF32 where the device has it
    args.work_dir.mkdir(parents=True, exist_ok=True)
    run = dict(data=make_data, vae=train_vae, unet=train_unet, assemble=assemble, grid=draw_grid)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        run[stage](args)


if __name__ == "__main__":
    main()
