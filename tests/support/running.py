"""Run the training script as users run it, and compare what it leaves."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.script import train_here  # noqa: F401 - the tests take it from here
from sdxl_ambient.training.state import load_tree

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [str(ROOT / "train_sdxl_ambient.py")]
TREES = {"optimizer.safetensors", "registered_0.safetensors", "registered_1.safetensors", "random_state_0.safetensors"}


def process_env(**more: str) -> dict[str, str]:
    """The environment of a process that a test starts."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", **more}


def arguments(emoji, output, **changes):
    options = {
        "pretrained_model_name_or_path": ROOT / "miniature/pipeline",
        "train_data_dir": emoji,
        "output_dir": output,
        "noise_key_file": Path(output).parent / "key",
        "resolution": 64,
        "t_n": 500,
        "rank": 4,
        "lora_alpha": 2,
        "lora_dropout": 0.1,  # makes the global random state matter on resume
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "train_batch_size": 4,
        "max_train_steps": 6,
        "checkpointing_steps": 2,
        "report_to": "none",
        **changes,
    }
    return [a for k, v in options.items() if v is not None for a in (f"--{k}", str(v))]


def launch(arguments, processes=1, check=True):
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    if processes > 1:
        # accelerate launch starts a single process on a CPU without MPI; torchrun starts them all, over gloo.
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-m", *launcher]
    run = subprocess.run(
        [*command, *SCRIPT, *arguments], capture_output=True, text=True, env=process_env(), cwd=ROOT, timeout=300
    )
    assert not check or run.returncode == 0, run.stderr[-3000:]
    return run


def error_line(run):
    assert run.returncode != 0
    (line,) = [x for x in run.stderr.splitlines() if x.startswith("train_sdxl_ambient.py: error:")]
    return line


def assert_same_updates(one, two, start, least=0.0):
    """The same weights, and the same changes since ``start``, the largest of them above ``least``.

    Of a small change a tolerance on weights alone would see nothing. Of weights that ``start`` hasn't nothing is known.
    """
    assert one.keys() == two.keys() and start and start.keys() <= one.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=0 if name in start else 1e-3)
    assert max(float((one[name] - start[name]).abs().max()) for name in start) > least
    apart = sum(float((one[name].double() - two[name].double()).square().sum()) for name in start)
    moved = sum(float((one[name].double() - start[name].double()).square().sum()) for name in start)
    assert apart < 1e-4 * moved, (apart / moved) ** 0.5


def no_lora_yet(state):
    """Where every LoRA starts: its B factors at zero."""
    return {name: torch.zeros_like(w) for name, w in state.items() if "lora_B" in name}


def states(folder):
    """Everything a checkpoint holds: weights, optimizer, scheduler."""
    trees = [load_tree(path) for path in sorted(folder.glob("*.safetensors")) if path.name in TREES]
    assert len(trees) >= 3
    return load_file(folder / "pytorch_lora_weights.safetensors"), *trees


def assert_identical(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    else:
        assert a == b
