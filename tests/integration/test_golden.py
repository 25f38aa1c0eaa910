"""Twenty steps of the miniature's shipped configuration in each way of training, against numbers that were stored once.

Moving or renaming code changes none of them. After a change that is meant to, this file, run as a script, writes them anew.
The last bits of a convolution differ between processors, so hashes are compared only on the kind that recorded them. The
losses are compared everywhere.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "train_sdxl_ambient.py").is_file())
GOLDEN = Path(__file__).with_name("golden.json")
RUNS = {
    "skip": {"low_noise": "skip"},
    "consistency": {"low_noise": "consistency", "t_n": 500, "consistency_weight": 1.0},
    "restore": {},
    "clean": {"low_noise": "clean"},
    "full": {"low_noise": "skip", "finetune": "full", "learning_rate": 1e-4},
}
KEY = "5d" * 32  # so that the store is the same each time; it protects nothing


def machine() -> dict:
    from sdxl_ambient.provenance import processor

    return {"processor": processor(), "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}


def images(folder: Path) -> Path:
    """The first sixteen pictures of the miniature's fine-tune split."""
    source = ROOT / "miniature/data/finetune"
    rows = (source / "metadata.jsonl").read_text().splitlines()[:16]
    folder.mkdir()
    for row in rows:
        shutil.copy(source / json.loads(row)["file_name"], folder)
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def train(name: str, pictures: Path, output: Path) -> None:
    from benchmarks.script import train_here

    output.parent.mkdir(parents=True, exist_ok=True)
    key = output.parent / "key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_text(KEY + "\n")
    options = {
        "config_file": ROOT / "configs/mini_lora.yaml",
        "pretrained_model_name_or_path": ROOT / "miniature/pipeline",
        "train_data_dir": pictures,
        "heldout_data_dir": pictures,
        "output_dir": output,
        "noise_key_file": key,
        "train_batch_size": 4,
        "max_train_steps": 20,
        "validation_steps": 20,
        "checkpointing_steps": 20,
        "report_to": "tensorboard",
        **RUNS[name],
    }
    assert train_here([a for k, v in options.items() for a in (f"--{k}", str(v))]) == 0


def shards_hash(folder: Path) -> str:
    from sdxl_ambient.provenance import hash_tensors

    return hash_tensors({k: v for path in sorted(folder.glob("latents-*")) for k, v in load_file(path).items()})


def results(output: Path, name: str) -> dict:
    """Losses of every step (float32), hashes of the stored latents and of the weights, as one JSON value."""
    from sdxl_ambient.provenance import hash_tensors

    folders = {path.parent for path in output.rglob("events.out.tfevents*")}
    losses: dict[str, list[float]] = {}
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if "loss" in tag or tag in ("ambient", "consistency", "restored", "lr"):
                losses[tag] = [event.value for event in events.Scalars(tag)]
    weights = output / ("unet/diffusion_pytorch_model.safetensors" if name == "full" else "pytorch_lora_weights.safetensors")
    state = load_file(weights)
    return {
        "losses": losses,
        "norm": float(sum(w.double().square().sum() for w in state.values())) ** 0.5,
        "stores": {p.name: shards_hash(p) for p in sorted(output.iterdir()) if (p / "manifest.json").is_file()},
        "weights": hash_tensors(state),
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return images(tmp_path_factory.mktemp("golden") / "pictures")


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_give_the_stored_numbers(name, pictures, tmp_path, one_thread):
    train(name, pictures, tmp_path / "run")
    golden, found = json.loads(GOLDEN.read_text()), results(tmp_path / "run", name)
    wanted = golden["runs"][name]
    assert found["losses"].keys() == wanted["losses"].keys() and len(found["losses"]) > 1
    if golden["machine"] == machine():
        assert found == wanted
    assert found["norm"] == pytest.approx(wanted["norm"], rel=1e-4)
    for tag, values in wanted["losses"].items():
        assert found["losses"][tag] == pytest.approx(values, rel=1e-2, abs=1e-4), tag
    assert found["stores"].keys() == wanted["stores"].keys()


def record() -> None:
    """Write the numbers that this code gives."""
    import tempfile

    torch.set_num_threads(1)
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        pictures = images(Path(folder) / "pictures")
        os.environ["SDXL_AMBIENT_HOME"] = str(Path(folder) / "home")
        for name in RUNS:
            train(name, pictures, Path(folder) / name / "run")
            runs[name] = results(Path(folder) / name / "run", name)
    GOLDEN.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(ROOT))
    record()
