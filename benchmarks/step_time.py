"""What an optimizer step costs: seconds, forward passes and peak memory of five kinds of step, in one run, on one model.

    python -m benchmarks.step_time [--model mini|sdxl] [--quick] --json benchmarks/results/step_time.json

    plain              denoising as the diffusers example does it, latents and prompt embeddings cached
    ambient            the ambient loss
    consistency        ambient + consistency, anchor at the ambient batch: 2 forward passes with graph, 1 without
    official           the official step's structure: 3 forward passes with graph and a repeated one without
    encode_every_time  plain, with VAE and text encoders in every step, as the diffusers LoRA example does
    restore            ambient + half as many restored samples, a quarter of them drawn anew by chains of 10

each for a LoRA and for the full UNet. ``sdxl`` is real SDXL from its configuration with random weights, for a GPU. The
kinds take turns, so that a slow minute hits all of them, and the median counts. Peak memory is what a step needs beyond
weights and optimizer states: on a GPU as the allocator reports it, on a CPU the growth of the peak resident size of a
process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from benchmarks.measuring import peak_of
from benchmarks.record import ROOT, target, write_record
from benchmarks.sdxl import sdxl, sdxl_schedule
from sdxl_ambient.models.denoiser import Conditioning, Denoiser
from sdxl_ambient.models.load import load_encoders, load_unet
from sdxl_ambient.models.lora import add_lora, trainable_to_float32
from sdxl_ambient.objective import ExtraRows, ObjectiveOptions, ambient_objective
from sdxl_ambient.posterior import sample_posterior
from sdxl_ambient.randomness import Randomness

T_N = 500
KINDS = ("plain", "ambient", "consistency", "official", "encode_every_time", "restore")


# -- models ----------------------------------------------------------------------


class Setup:
    """A model on a device with a batch of random latents, embeddings, pixels and tokens."""

    def __init__(self, model: str, finetune: str, batch: int, device: str, precision: str, checkpointing: bool,
                 attention: str = "sdpa"):  # fmt: skip
        self.device, self.batch = device, batch
        half = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[precision]
        # As in training: frozen weights may be half, trained ones are float32 under autocast.
        self.dtype = half if finetune == "lora" else torch.float32
        self.autocast = torch.autocast(device, half) if half != torch.float32 else contextlib.nullcontext()
        torch.manual_seed(0)
        with torch.device(device) if model == "sdxl" else contextlib.nullcontext():
            unet, self.encoders, side, width, pooled = (mini if model == "mini" else sdxl)(self.dtype)
        self.unet: Any = unet  # a UNet, or what torch.compile makes of it
        UNet2DConditionModel.to(self.unet, device, self.dtype)
        self.encoders.to(device)
        if finetune == "lora":
            add_lora(self.unet, rank=16, alpha=16, targets=["attention"])
        else:
            self.unet.requires_grad_(True)
            trainable_to_float32(self.unet)
        if attention == "xformers":
            self.unet.enable_xformers_memory_efficient_attention()
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.unet.train()
        self.schedule = sdxl_schedule()
        generator = torch.Generator().manual_seed(0)
        self.x_0 = torch.randn(batch, 4, side, side, generator=generator).to(device)
        self.t_n = torch.full((batch,), T_N)
        size = float(side * 8)
        self.conditioning = Conditioning(
            torch.randn(batch, 77, width, generator=generator), torch.randn(batch, pooled, generator=generator),
            torch.tensor([size, size, 0, 0, size, size]).expand(batch, 6),
        ).to(device, self.dtype)  # fmt: skip
        scale = 2 ** (len(self.encoders.vae.config["block_out_channels"]) - 1)
        self.pixels = torch.rand(batch, 3, side * scale, side * scale, generator=generator).mul(2).sub(1)
        self.tokens = torch.randint(1000, (batch, 77), generator=generator)
        self.generator = generator
        parameters = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def synchronize(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


def mini(dtype):
    folder = ROOT / "miniature/pipeline"
    unet = load_unet(folder, dtype=dtype)
    encoders = load_encoders(str(folder))
    side, width = unet.config["sample_size"], unet.config["cross_attention_dim"]
    pooled = encoders.text_encoders[1].config.projection_dim
    assert pooled is not None
    return unet, encoders, side, width, pooled


# -- steps ----------------------------------------------------------------------


def plain(s: Setup):
    """The diffusers example's step on cached latents and embeddings."""
    return plain_loss(s, s.x_0, s.conditioning)


def plain_loss(s: Setup, latents, conditioning):
    noise = torch.randn(latents.shape, generator=s.generator).to(s.device)
    t = torch.randint(1000, (len(latents),), generator=s.generator).to(s.device)
    bar = s.schedule.alpha_bar(t).float()[:, None, None, None]
    predicted = Denoiser(s.unet, conditioning, s.dtype)(bar.sqrt() * latents + (1 - bar).sqrt() * noise, t)
    return torch.nn.functional.mse_loss(predicted.float(), noise)


def objective(s: Setup, **options):
    denoise = Denoiser(s.unet, s.conditioning, s.dtype)
    return ambient_objective(denoise, s.schedule, s.x_0, s.t_n, s.generator, ObjectiveOptions(**options)).total


def ambient(s: Setup):
    return objective(s)


def consistency(s: Setup):
    return objective(s, consistency_weight=1.0)


def official(s: Setup):
    """Both branches with graph, the anchor's forward pass made again without one."""
    denoise = Denoiser(s.unet, s.conditioning, s.dtype)
    with torch.no_grad():
        denoise(s.x_0, s.t_n.to(s.device) + 1)
    options = ObjectiveOptions(consistency_weight=1.0, consistency_estimator="both", consistency_stop_anchor=True)
    return ambient_objective(denoise, s.schedule, s.x_0, s.t_n, s.generator, options).total


def encode_every_time(s: Setup):
    with torch.no_grad():
        (distribution,) = s.encoders.vae.encode(s.pixels.to(s.device), return_dict=False)
        latents = distribution.sample() * s.encoders.vae.config["scaling_factor"]
        tokens = s.tokens.to(s.device)
        outputs = [e(tokens, output_hidden_states=True) for e in s.encoders.text_encoders]
        embeds = torch.cat([o.hidden_states[-2] for o in outputs], -1)
        conditioning = Conditioning(embeds, outputs[1].text_embeds, s.conditioning.time_ids).to(s.device, s.dtype)
    return plain_loss(s, latents, conditioning)


def restoring(s: Setup):
    half, quarter = max(1, s.batch // 2), max(1, s.batch // 8)
    denoise = Denoiser(s.unet, s.conditioning.rows(slice(quarter)), s.dtype)
    fresh = sample_posterior(denoise, s.schedule, s.x_0[:quarter], s.t_n[:quarter], 10, Randomness(s.generator, quarter))
    x_0 = torch.cat([fresh, s.x_0[quarter:half]])
    both = s.conditioning.followed_by(s.conditioning.rows(slice(half)))
    restored = ExtraRows(x_0, s.t_n[:half])
    return ambient_objective(Denoiser(s.unet, both, s.dtype), s.schedule, s.x_0, s.t_n, s.generator, None, restored).total


STEPS = dict(
    plain=plain, ambient=ambient, consistency=consistency, official=official, encode_every_time=encode_every_time,
    restore=restoring,
)  # fmt: skip


def step(s: Setup, kind: str) -> None:
    with s.autocast:
        loss = STEPS[kind](s)
    loss.backward()
    s.optimizer.step()
    s.optimizer.zero_grad()
    s.synchronize()


def forwards(s: Setup, kind: str) -> dict:
    """Forward passes of a step, in samples over the batch, with and without graph."""
    count = {"with_graph": 0.0, "without_graph": 0.0}

    def hook(module, args):
        count["with_graph" if torch.is_grad_enabled() else "without_graph"] += len(args[0]) / s.batch

    handle = s.unet.register_forward_pre_hook(hook)
    step(s, kind)
    handle.remove()
    return count


# -- measuring ----------------------------------------------------------------------


def peak_here(s: Setup, kind: str) -> int:
    """Bytes that a step needs beyond what is there before it."""
    step(s, "plain")  # optimizer states
    if s.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(s, kind)
        return torch.cuda.max_memory_allocated() - before
    raise ValueError("on a CPU, ask a process of its own")


def peak_in_process(args, finetune: str, kind: str) -> int:
    command = [sys.executable, "-m", "benchmarks.step_time", "--json", "-", "--peak_of", kind, "--finetune", finetune,
               "--model", args.model, "--batch_size", str(args.batch_size), "--precision", args.precision]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])["peak"]


def print_peak(args) -> None:
    """In a process of its own: growth of the peak resident size over two steps, beyond what is resident before them."""
    s = Setup(args.model, args.finetune[0], args.batch_size, "cpu", args.precision, False)
    growth, _, _ = peak_of(lambda: [step(s, args.peak_of) for _ in range(2)])
    print(json.dumps({"peak": growth}))


def measure(args, finetune: str, device: str) -> dict:
    s = Setup(args.model, finetune, args.batch_size, device, args.precision, args.gradient_checkpointing,
              args.attention)  # fmt: skip
    if args.compile:
        s.unet = torch.compile(s.unet)
    found: dict[str, Any] = {kind: forwards(s, kind) for kind in args.kinds}
    seconds = {kind: [] for kind in args.kinds}
    for _ in range(args.steps):
        for kind in args.kinds:
            start = time.perf_counter()
            step(s, kind)
            seconds[kind].append(time.perf_counter() - start)
    for kind in args.kinds:
        found[kind]["seconds"] = statistics.median(seconds[kind])
        found[kind]["images_per_second"] = args.batch_size / found[kind]["seconds"]
        if device == "cuda":
            found[kind]["peak_bytes"] = peak_here(s, kind)
    if device == "cuda":
        found["weights_and_states_bytes"] = torch.cuda.memory_allocated()
    del s
    if device == "cpu" and not args.no_memory:
        for kind in args.kinds:
            found[kind]["peak_bytes"] = peak_in_process(args, finetune, kind)
    return found


def targets(figures: dict) -> list[dict]:
    """The worse of LoRA and full fine-tuning counts."""

    def ratio(a, b, what="seconds"):
        return max(one[a][what] / one[b][what] for one in figures.values())

    return [
        target("ambient_over_plain", ratio("ambient", "plain"), "<=", 1.03),
        target("consistency_over_official", ratio("consistency", "official"), "<=", 0.70),
        target("consistency_memory_over_official", ratio("consistency", "official", "peak_bytes"), "<=", 0.8),
        target("ambient_over_encode_every_time", ratio("ambient", "encode_every_time"), "<=", 0.8),
    ]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="two timed steps")
    parser.add_argument("--model", choices=("mini", "sdxl"), default="mini")
    parser.add_argument("--finetune", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=61)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--attention", choices=("sdpa", "xformers"), default="sdpa")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no_memory", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak_of", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.peak_of:
        print_peak(args)
        return 0
    args.steps = 2 if args.quick else args.steps
    started = time.perf_counter()
    figures = {}
    for finetune in args.finetune:
        figures[finetune] = measure(args, finetune, args.device)
        for kind in args.kinds:
            print(finetune, kind, {k: round(v, 4) for k, v in figures[finetune][kind].items()}, flush=True)
    whole = set(args.kinds) == set(KINDS) and not (args.no_memory and args.device == "cpu")
    write_record(args.json, "step_time", figures, targets(figures) if whole else [], started)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
