"""Encoding and generation at SDXL's real size, with random weights: pictures per second and peak memory. For a GPU.

python -m benchmarks.throughput --json benchmarks/results/throughput-gpu.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
from transformers import AutoTokenizer

from benchmarks.record import ROOT, write_record
from benchmarks.sdxl import sdxl
from sdxl_ambient.models.vae import encode_image
from sdxl_ambient.pipeline import sample


def timed(function, repeats: int) -> dict:
    """Seconds of the fastest repeat after one to warm up, and peak memory."""
    function()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "peak_bytes": torch.cuda.max_memory_allocated()}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--inference_steps", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="two inference steps")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    torch.manual_seed(0)
    with torch.device("cuda"):
        unet, encoders, *_ = sdxl(torch.bfloat16)
    folder = ROOT / "miniature/pipeline"  # has SDXL's own tokenizers and scheduler
    tokenizer, tokenizer_2 = (AutoTokenizer.from_pretrained(folder, subfolder=f) for f in ("tokenizer", "tokenizer_2"))
    scheduler = EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")

    pixels = torch.rand(3, 1024, 1024).mul(2).sub(1)
    encoding = timed(lambda: [encode_image(encoders.vae, pixels) for _ in range(8)], 2)
    figures = {"encode_1024_float32": {**encoding, "images_per_second": 8 / encoding["seconds"]}}
    print(figures, flush=True)

    vae = AutoencoderKL.to(encoders.vae, torch.bfloat16)
    first, second = encoders.text_encoders
    for encoder in (first, second):
        torch.nn.Module.to(encoder, torch.bfloat16)
    pipe = StableDiffusionXLPipeline(
        vae, first, second, tokenizer, tokenizer_2, unet,
        scheduler,  # pyright: ignore[reportArgumentType] - diffusers annotates an enum of schedulers
        add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    steps = 2 if args.quick else args.inference_steps

    def draw():
        generators = [torch.Generator().manual_seed(i) for i in range(args.batch_size)]
        sample(pipe, ["a cat"] * args.batch_size, sampler="full", t_n=None, generators=generators, num_inference_steps=steps)

    drawing = timed(draw, 1)
    figures[f"generate_1024_bf16_{steps}_steps"] = {**drawing, "images_per_second": args.batch_size / drawing["seconds"]}
    print(figures, flush=True)
    write_record(args.json, "throughput", figures, [], started)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
