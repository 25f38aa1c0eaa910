"""The evaluation shared over two processes gives what one process gives, byte for byte."""

import copy
import re
import subprocess
import sys

import pytest
import torch
from support.pictures import copy_emoji
from support.running import process_env
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from eval.embedding import FeatureCache
from sdxl_ambient.formats.peft import save_lora
from sdxl_ambient.models.lora import add_lora
from sdxl_ambient.provenance import read_json

pytestmark = pytest.mark.slow
LAUNCHERS = {"one": [], "two": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]}


@pytest.fixture(scope="module")
def inputs(miniature, unet, tmp_path_factory):
    """A random LoRA, a CLIP of random weights, and two sets, each with a file that can't be opened: the flags for them."""
    root = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    tuned = copy.deepcopy(unet)
    add_lora(tuned, rank=2, alpha=2, targets=["attention"])
    for p in tuned.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn_like(p)
    save_lora(tuned, root / "lora", {"t_n": 500})
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = CLIPTokenizer.from_pretrained(miniature / "tokenizer")
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 77, "projection_dim": 16}
    vision = {**small, "image_size": 48, "patch_size": 16, "projection_dim": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    for split, place in (("finetune", 2), ("heldout", 20)):
        folder = copy_emoji(root / split, 61, split)
        sorted(folder.glob("*.png"))[place].write_text(f"no image of {split}")
    return [
        *("--pretrained_model_name_or_path", str(miniature), "--lora", f"noisy={root / 'lora'}"),
        *("--train_data_dir", str(root / "finetune"), "--heldout_data_dir", str(root / "heldout")),
        *("--clip_score_model", str(root / "clip"), "--embedding_batch_size", "7"),
        *("--num_images", "5", "--worst_case_images", "4", "--num_inference_steps", "2", "--batch_size", "2"),
        *("--attack_images", "5", "--attack_t", "500", "--attack_steps", "2"),
    ]


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Each launcher's finished process and the folder it wrote. Both ran under equal relative names, so that no path in a
    report differs, and without git, so that a commit made meanwhile is no difference either."""
    found = {}
    for name, launcher in LAUNCHERS.items():
        folder = tmp_path_factory.mktemp(name)
        command = [sys.executable, "-m", *launcher, "eval.memorization", *inputs, "--output_dir", "out"]
        env = {**process_env(), "GIT_DIR": str(folder / "none")}
        run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
        found[name] = (run, folder / "out")
    return found


def contents(folder, pattern):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.glob(pattern))}


def test_the_report_is_the_same_byte_for_byte(runs):
    one, two = ((out / "report.json").read_bytes() for _, out in runs.values())
    assert one == two
    report = read_json(runs["one"][1] / "report.json")
    # What was compared is a whole evaluation: samplers, attacks, planted copies, and what could not be opened.
    noisy = report["models"]["noisy"]
    assert {"full", "hybrid", "early_stop", "scale_0.5", "scale_1.5", "guidance_1", "mean_4"} == set(noisy["samplers"])
    assert {"error/500", "mask", "magnitude"} < set(noisy["attacks"]) and report["threshold"]["value"] is not None
    planted = ["copy", "jpeg", "blur", "flip", "crop", "turn", "border", "colour", "quarter", "vae"]
    assert list(report["controls"]["planted"]) == planted
    assert noisy["samplers"]["full"]["clip_score"]["n"] == 5
    for data in report["data"].values():
        assert [row["reason"] for row in data["excluded"]].count("not an image, or of an unknown format") == 1


def test_images_answers_and_page_are_the_same(runs):
    for pattern in ("generated/**/*.png", "generated/**/metadata.jsonl", "attacks/*/attack.json", "controls.json", "*.html"):
        one, two = (contents(out, pattern) for _, out in runs.values())
        assert one and one == two, pattern


def test_embeddings_are_the_same_however_they_are_cut_into_shards(runs):
    stored = []
    for _, out in runs.values():
        caches = {folder.name: FeatureCache(folder) for folder in (out / "embeddings").iterdir()}
        stored.append({name: (sorted(c.place), *map(bytes, c.read(sorted(c.place)))) for name, c in caches.items()})
    names = {name.split("-")[0] for name in stored[0]}
    assert names == {"pixel", "pooled_pixels", "fingerprint", "clip"} and stored[0] == stored[1]
    shards = [sorted(p.name for p in (out / "embeddings").rglob("*.safetensors")) for _, out in runs.values()]
    assert shards[0] != shards[1]  # the work really was shared


def test_only_one_process_speaks(runs):
    spoken = [run.stdout.replace(str(out), "") for run, out in runs.values()]
    assert spoken[0] == spoken[1]
    assert spoken[1].count("index.html") == 1 and len(re.findall(r"^noisy: ", spoken[1], re.MULTILINE)) == 1
