"""What training SDXL needs of a GPU's memory, computed from its real shapes without a GPU.

    python -m benchmarks.memory [--quick] --json benchmarks/results/memory.json
    python -m benchmarks.memory --table docs/MEMORY.md        put the committed result's table there, between its two marks

Real SDXL from its configuration, as fake tensors, at 1024×1024 in bfloat16; see sdxl_ambient/memory.py for what is counted.
Where benchmarks/step_time.py has measured the same step on a GPU, the two are compared.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from benchmarks.marks import put_between
from benchmarks.record import ROOT, target, write_record
from benchmarks.sdxl import sdxl
from sdxl_ambient.models.denoiser import Conditioning, Denoiser
from sdxl_ambient.models.lora import add_lora
from sdxl_ambient.models.quantization import quantized_bytes, quantized_layers
from sdxl_ambient.training.memory import estimate

GIB = 2**30
RESULT = ROOT / "benchmarks/results/memory.json"
START, END = "<!-- computed: python -m benchmarks.memory --table docs/MEMORY.md -->", "<!-- /computed -->"
PARTS = ("weights", "gradients", "optimizer", "averages", "activations", "step", "total")
# Options of each setting by their names; the rest is usual.
_LORA, _FULL = dict(finetune="lora"), dict(finetune="full", gradient_checkpointing=True)
SETTINGS = {
    "lora": _LORA,
    "lora_checkpointing": dict(_LORA, gradient_checkpointing=True),
    "lora_nf4": dict(_LORA, quantize_base="nf4"),
    "lora_nf4_checkpointing": dict(_LORA, quantize_base="nf4", gradient_checkpointing=True),
    "lora_text_encoders": dict(_LORA, train_text_encoder=True, gradient_checkpointing=True),
    "full": dict(finetune="full"),
    "full_checkpointing": _FULL,
    "full_adamw8bit": dict(_FULL, optimizer="adamw8bit"),
    "full_fused": dict(_FULL, optimizer="adafactor", fused_backward_pass=True, max_grad_norm=0),
    "full_ema": dict(_FULL, use_ema=True),
    "full_ema_offloaded": dict(_FULL, use_ema=True, offload_ema=True),
}
# The same steps as a GPU's allocator saw them: file, setting, batch. Measured is the peak beyond weights and states.
MEASURED = (
    ("step_time-gpu-lora-b1.json", "lora", 1),
    ("step_time-gpu-lora-b4.json", "lora", 4),
    ("step_time-gpu-lora-b4-checkpointing.json", "lora_checkpointing", 4),
    ("step_time-gpu-full-b1-checkpointing.json", "full_checkpointing", 1),
)


class CudaAutocast(TorchFunctionMode):
    """On a GPU autocast computes norms in float32, on a CPU it doesn't. Fake tensors of a GPU need a build for one."""

    norms = (torch.nn.functional.group_norm, torch.nn.functional.layer_norm, torch.group_norm, torch.layer_norm)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.norms and torch.is_autocast_enabled("cpu"):
            args = [_single(a) for a in args]
            kwargs = {name: _single(a) for name, a in kwargs.items()}
        return func(*args, **kwargs)


def _single(value):
    return value.float() if isinstance(value, torch.Tensor) else value


def to_fake(module: torch.nn.Module) -> None:
    """Tensors of the meta device become the current mode's fake ones, which have autocast."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def networks(options: dict) -> tuple[list[torch.nn.Module], int, Sequence[int]]:
    """UNet and, where they are trained, text encoders, on the meta device; what a quantised base saves, in bytes; the
    latent's side, the embeddings' width and the pooled one's."""
    lora = options["finetune"] == "lora"
    with torch.device("meta"):
        unet, encoders, *sizes = sdxl(torch.bfloat16 if lora else torch.float32)
        kind, saved = options.get("quantize_base"), 0
        if kind:
            weights = [layer.weight for layer in quantized_layers(unet).values()]
            saved = sum(w.nbytes - quantized_bytes(w, kind) for w in weights)
        trained: list[torch.nn.Module] = [unet]
        if lora:
            add_lora(unet, rank=16, alpha=16, targets=["attention"])
        if options.get("train_text_encoder"):
            for encoder in encoders.text_encoders:
                encoder.add_adapter(LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"]))
                trained.append(encoder)
    return [m.train() for m in trained], saved, sizes


def setting(options: dict, batch: int) -> dict[str, int]:
    """Bytes of one setting by part."""
    modules, saved, (side, width, pooled) = networks(options)
    unet, *encoders = modules
    dtype = torch.bfloat16 if options["finetune"] == "lora" else torch.float32
    with FakeTensorMode():
        for module in modules:
            to_fake(module)
        if options.get("gradient_checkpointing"):
            assert isinstance(unet, UNet2DConditionModel)
            unet.enable_gradient_checkpointing()
        x_t, t = torch.randn(batch, 4, side, side), torch.zeros(batch, dtype=torch.long)
        shown = (torch.randn(batch, 77, width, dtype=dtype), torch.randn(batch, pooled, dtype=dtype), torch.zeros(batch, 6))
        tokens = torch.zeros(batch, 77, dtype=torch.long)

        def forward():
            with torch.autocast("cpu", torch.bfloat16), CudaAutocast():
                embeds, pool, ids = shown
                if encoders:
                    outputs = [e(tokens, output_hidden_states=True) for e in encoders]
                    embeds, pool = torch.cat([o.hidden_states[-2] for o in outputs], -1), outputs[1][0]
                predicted = Denoiser(unet, Conditioning(embeds, pool, ids), dtype)(x_t, t)
            return (predicted.float() - x_t).square().mean()

        names = ("optimizer", "fused_backward_pass", "use_ema", "offload_ema")
        found = estimate(modules, forward=forward, **{n: options[n] for n in names if n in options})
    return {**found, "weights": found["weights"] - saved, "total": found["total"] - saved}


def compared(settings: dict) -> dict[str, dict]:
    """Computed and measured GiB of a step beyond weights and optimizer states."""
    found = {}
    for file, name, batch in MEASURED:
        (kinds,) = (v for k, v in json.loads((RESULT.parent / file).read_text())["figures"].items() if k in ("lora", "full"))
        one = settings[name][str(batch)]
        computed = one["total"] - one["weights"] - one["optimizer"]
        measured = kinds["plain"]["peak_bytes"] / GIB
        found[f"{name}, batch {batch}"] = {"computed": computed, "measured": measured, "ratio": computed / measured}
    return found


def flags(options: dict) -> str:
    """The options as one types them."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in options.items())


def table(record: dict) -> str:
    """Markdown: GiB by part for every setting and batch, and the comparison."""
    lines = ["| options | batch | " + " | ".join(PARTS) + " |", "|---|---|" + "---|" * len(PARTS)]
    for name, batches in record["figures"]["settings"].items():
        for batch, one in batches.items():
            figures = " | ".join(f"{one[p]:.1f}" if p != "total" else f"**{one[p]:.1f}**" for p in PARTS)
            lines.append(f"| `{flags(SETTINGS[name])}` | {batch} | {figures} |")
    lines += ["", "| step, beyond weights and optimizer states | computed | measured on an H100 |", "|---|---|---|"]
    for what, one in record["figures"]["compared"].items():
        name, batch = what.split(", ")
        lines.append(f"| `{flags(SETTINGS[name])}`, {batch} | {one['computed']:.1f} | {one['measured']:.1f} |")
    return "\n".join(lines)


def written(text: str, record: dict) -> str:
    """``text`` with the table between the marks put anew; a ValueError where the marks are not there, once each."""
    return put_between(text, START, END, table(record))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true", help="batch 1 alone where nothing else was measured")
    parser.add_argument("--table", type=Path, help="only put the committed result's table into this file")
    args = parser.parse_args(argv)
    if args.table:
        args.table.write_text(written(args.table.read_text(), json.loads(RESULT.read_text())))
        return 0
    started, settings = time.perf_counter(), {}
    for name, options in SETTINGS.items():
        measured = {batch for _, other, batch in MEASURED if other == name}
        settings[name] = {}
        for batch in sorted({1} | measured) if args.quick else (1, 4):
            found = {part: value / GIB for part, value in setting(options, batch).items()}
            settings[name][str(batch)] = found
            print(f"{name}, batch {batch}: {found['total']:.2f} GiB", flush=True)
    comparison = compared(settings)
    targets = [
        target("full_fused_gib", settings["full_fused"]["1"]["total"], "<=", 24),
        target("lora_12gb_gib", settings["lora_checkpointing"]["4"]["total"], "<=", 12),
        target("memory_over_measured", max(abs(one["ratio"] - 1) for one in comparison.values()), "<=", 0.1),
    ]
    write_record(args.json, "memory", {"settings": settings, "compared": comparison}, targets, started)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
