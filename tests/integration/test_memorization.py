"""The evaluation end to end, on the miniature SDXL and real images, with every way to get it wrong."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import REPOSITORY, copy_emoji
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from eval.memorization import main
from eval.options import BASE, MemorizationOptions
from sdxl_ambient.config.parser import load_options
from sdxl_ambient.errors import OptionError
from sdxl_ambient.formats.peft import save_lora, save_unet
from sdxl_ambient.models.lora import add_lora
from sdxl_ambient.provenance import read_json

DATA = REPOSITORY / "miniature" / "data"
SETS = ["--train_data_dir", str(DATA / "finetune"), "--heldout_data_dir", str(DATA / "heldout")]


@pytest.fixture(scope="module")
def tuned(unet, tmp_path_factory):
    """A LoRA trained at t_n = 500 and a full UNet of unknown history, neither of them any good."""
    root = tmp_path_factory.mktemp("tuned")
    one = copy.deepcopy(unet)
    add_lora(one, rank=2, alpha=2, targets=["attention"])
    for p in one.parameters():
        if p.requires_grad:
            p.data += 0.02
    save_lora(one, root / "lora_noisy", {"t_n": 500})
    save_unet(unet, root / "whole", {"t_n": None})
    return root


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory):
    """A CLIP of random weights with a real tokenizer, as a local folder."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = CLIPTokenizer.from_pretrained(REPOSITORY / "miniature/pipeline/tokenizer")
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 77, "projection_dim": 16}
    vision = {**small, "image_size": 32, "patch_size": 16, "projection_dim": 16}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_models_end_to_end_and_a_second_run_redoes_nothing(miniature, tuned, tmp_path, capsys):
    out = tmp_path / "report"
    flags = [
        *("--pretrained_model_name_or_path", str(miniature), "--lora", f"noisy={tuned / 'lora_noisy'}"),
        *("--unet", str(tuned / "whole"), "--samplers", "full", "hybrid", "--sampler_t_n", "500"),
        *("--num_images", "2", "--num_inference_steps", "3", *SETS, "--output_dir", str(out)),
        *("--attack_t", "500", "--attack_steps", "2", "--attack_images", "3", "--guidance_scale", "5"),
    ]
    assert main(flags) == 0
    report = read_json(out / "report.json")
    assert list(report["models"]) == ["base", "noisy", "whole"]
    assert list(report["models"]["base"]["samplers"]) == ["full", "guidance_1", "mean_4"]
    for model in report["models"].values():
        worst = model["samplers"][model["worst_sampler"]]
        for key in ("n_generated", "similarity_to_train", "similarity_to_heldout", "share_above_threshold"):
            assert model[key] == worst[key]
        assert model["samplers"]["full"]["n_generated"] == 2 and model["samplers"]["mean_4"]["n_generated"] == 1
    noisy_attacks = report["models"]["noisy"]["attacks"]
    assert list(noisy_attacks) == ["error/500", "one_step/500", "posterior/500", "mask", "magnitude"]
    assert noisy_attacks["error/500"]["n_train"] == 3 and noisy_attacks["mask"]["difference_to_base"] is not None
    assert report["models"]["base"]["attacks"]["mask"]["difference_to_base"] is None
    planted = ["copy", "jpeg", "blur", "flip", "crop", "turn", "border", "colour", "quarter", "vae"]
    assert list(report["controls"]["planted"]) == planted
    noisy = report["models"]["noisy"]
    assert noisy["samplers"]["full"]["copied_share"]["recall_control"] == "vae"
    names = ["full", "hybrid", "early_stop", "scale_0.5", "scale_1.5", "guidance_1", "mean_4"]
    assert list(noisy["samplers"]) == names and noisy["own_sampler"] == "full"
    worst = noisy["worst_case"]
    assert [row["name"] for row in worst["rows"]] == [*names, *noisy_attacks] and worst["tests"] == 12
    assert worst["confidence_each"] == pytest.approx(1 - 0.05 / 12)
    assert noisy["samplers"]["scale_0.5"]["settings"]["lora_scale"] == 0.5
    assert (noisy["trained_t_n"], noisy["samplers"]["hybrid"]["t_n"], noisy["samplers"]["full"]["t_n"]) == (500, 500, None)
    assert sorted(p.name for p in (out / "generated" / "noisy").iterdir()) == sorted([*names, "mean_4.samples"])
    # The full UNet is the base's own, and so are its images.
    same = [read_json(out / "generated" / m / "full" / "manifest.json")["settings"] for m in ("base", "whole")]
    assert same[0]["base_weights"] == same[1]["base_weights"] and same[1]["unet_weights"]
    assert (
        report["models"]["whole"]["samplers"]["full"]["fd_pixels"]
        == report["models"]["base"]["samplers"]["full"]["fd_pixels"]
    )

    made = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.parent != out}
    before, controls = (out / "report.json").read_bytes(), (out / "controls.json").stat().st_mtime_ns
    assert main(flags) == 0
    assert (out / "controls.json").stat().st_mtime_ns == controls
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.parent != out} == made
    assert (out / "report.json").read_bytes() == before
    assert str(out / "index.html") in capsys.readouterr().out


def given(tmp_path, folder, *more):
    return ["--generated_dir", f"model={folder}", *SETS, "--output_dir", str(tmp_path / "out"), *more]


def test_planted_copies_are_found_and_unrelated_images_are_not(tmp_path):
    """Half blurred copies of training emoji, half emoji of another split: the share above is about one half."""
    folder = copy_emoji(tmp_path / "generated", 20)
    for path in folder.glob("*.png"):
        Image.open(path).convert("RGBA").resize((24, 24)).resize((64, 64)).save(path)
    copy_emoji(tmp_path / "unrelated", 20, "pretrain")
    for path in (tmp_path / "unrelated").glob("*.png"):
        shutil.copy(path, folder / f"other_{path.name}")
    (folder / "metadata.jsonl").unlink()
    assert main(given(tmp_path, folder)) == 0
    model = read_json(tmp_path / "out" / "report.json")["models"]["model"]
    assert 0.45 <= model["share_above_threshold"] <= 0.55
    assert model["verdict"]["level"] == "above"
    figures = model["samplers"]["given"]
    low, high = figures["interval"]
    assert low < model["share_above_threshold"] < high
    # Every copy is found and few others are: the corrected share is the true one, and a budget is kept or it isn't.
    assert figures["copied_share"]["low"] < 0.5 < figures["copied_share"]["high"]
    assert figures["copied_share"]["recall_control"] == "jpeg" and figures["effective_images"] == 40
    assert 18 <= figures["discoveries"]["count"] <= 22
    assert figures["authpct"] < 0.6 and figures["c_t"]["value"] < -2 and figures["c_t"]["cells"] == 1
    assert 0.4 <= figures["legacy_shares"]["0.9"] <= 0.6 and figures["kid"] is not None and figures["vendi"] > 5
    assert figures["prdc"].keys() == {"precision", "recall", "density", "coverage"}
    planted = read_json(tmp_path / "out" / "report.json")["controls"]["planted"]
    assert planted["copy"]["share_above_threshold"] == 1 and planted["flip"]["share_above_threshold"] > 0.9
    assert planted["turn"]["share_above_threshold"] < 0.5  # what it is blind to is said
    assert main(given(tmp_path, folder, "--max_excess", "0.2")) == 1
    assert main(given(tmp_path, folder, "--max_excess", "0.6")) == 3  # 40 images show neither
    assert main(given(tmp_path, folder, "--max_excess", "0.9")) == 0
    assert figures["excess_interval"][0] < figures["excess_over_heldout"] < figures["excess_interval"][1]
    assert figures["excess_over_heldout"] > 0.4 > 0.1 > figures["share_above_threshold_heldout"]
    for row in figures["images"]:
        if not row["file"].startswith("other_"):
            assert row["nearest_train"] == row["file"]


def test_heldout_images_that_show_a_training_image_are_left_out_and_listed(tmp_path):
    """A mirrored, recompressed training image among the held-out ones, which would raise the threshold, is named."""
    train, heldout = (copy_emoji(tmp_path / name, 60, name) for name in ("finetune", "heldout"))
    asymmetric = sorted(train.glob("*.png"))[1]
    flags = ["--generated_dir", f"x={copy_emoji(tmp_path / 'g', 3)}", "--train_data_dir", str(train)]
    flags += ["--heldout_data_dir", str(heldout), "--output_dir", str(tmp_path / "out")]
    picture = Image.alpha_composite(Image.new("RGBA", (64, 64), "white"), Image.open(asymmetric).convert("RGBA"))
    picture.convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(heldout / "copy.jpg", quality=80)
    assert main(flags) == 0
    rows = read_json(tmp_path / "out/report.json")["data"]["heldout"]["excluded"]
    (row,) = [row for row in rows if row["file"] == "copy.jpg"]
    assert row["reason"].startswith(f"near-duplicate of {asymmetric.name}") and "(mirrored)" in row["reason"]
    assert main([*flags, "--near_duplicates", "keep"]) == 0
    kept = read_json(tmp_path / "out/report.json")["data"]["heldout"]["excluded"]
    assert all(row["reason"].startswith("same file as") for row in kept)


def test_report_is_standard_json_without_nan(tmp_path):
    folder = copy_emoji(tmp_path / "generated", 1)  # one image: no Fréchet distance
    assert main(given(tmp_path, folder)) == 0

    def refuse(constant):
        raise AssertionError(constant)

    report = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=refuse)
    assert report["schema_version"] == 3
    assert report["models"]["model"]["samplers"]["given"]["fd_pixels"] is None


def test_too_few_held_out_images_give_exit_code_3_and_a_descriptive_report(tmp_path):
    heldout = copy_emoji(tmp_path / "heldout", 48, "heldout")
    generated = copy_emoji(tmp_path / "generated", 3)
    flags = given(tmp_path, generated)
    flags[flags.index("--heldout_data_dir") + 1] = str(heldout)
    assert main(flags) == 3
    report = read_json(tmp_path / "out" / "report.json")
    model = report["models"]["model"]
    assert report["threshold"]["value"] is None and model["share_above_threshold"] is None
    assert model["similarity_to_train"]["quantiles"]["0.5"] == pytest.approx(1)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "There is not enough data to tell" in page and "at least 49 are needed" in page


def test_awkward_images_are_listed_in_the_report(tmp_path):
    train = copy_emoji(tmp_path / "train", 60)
    shutil.copy(next(train.glob("*.png")), train / "zz_again.png")
    (train / "broken.png").write_bytes(b"\x89PNG rubbish")
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(train / "dot.png")
    generated = copy_emoji(tmp_path / "generated", 3)
    Image.new("L", (30, 20), 128).save(generated / "grey.png")
    (generated / "words.jpg").write_text("no")
    flags = given(tmp_path, generated)
    flags[flags.index("--train_data_dir") + 1] = str(train)
    assert main(flags) == 0
    report = read_json(tmp_path / "out" / "report.json")
    assert {r["file"] for r in report["data"]["train"]["excluded"]} == {"zz_again.png", "broken.png", "dot.png"}
    figures = report["models"]["model"]["samplers"]["given"]
    assert [r["file"] for r in figures["excluded"]] == ["words.jpg"]
    assert figures["n_generated"] == 4
    page = (tmp_path / "out" / "index.html").read_text()
    assert "same file as" in page and "too small: 1x1" in page


def options(*flags):
    return load_options(MemorizationOptions, list(flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--train_data_dir: required"),
        (["--train_data_dir", "x"], "--output_dir: required"),
        ([*SETS, "--output_dir", "o", "--generated_dir", "a=.", "--preset", "best"], "--preset: 'best' is not one of"),
        (
            [*SETS, "--output_dir", "o", "--generated_dir", "a=.", "--preset", "paper", "--embedder", "clip"],
            "names an embedder",
        ),
        (
            [*SETS, "--output_dir", "o", "--generated_dir", "a=.", "--worst_case", "all"],
            "'all' is not one of standard, none",
        ),
        (
            [*SETS, "--output_dir", "o", "--generated_dir", "a=.", "--clip_score_model", "./x"],
            "--clip_score_model: './x' is not a",
        ),
        ([*SETS, "--output_dir", "o", "--generated_dir", "a=.", "--until", "report"], "'report' is not one of generate"),
        ([*SETS, "--output_dir", "o"], "--pretrained_model_name_or_path: required, unless"),
        ([*SETS, "--output_dir", "o", "--lora", "x"], "--pretrained_model_name_or_path: required"),
        ([*SETS, "--output_dir", "o", "--generated_dir", "nowhere"], "--generated_dir: 'nowhere' is not a folder"),
        ([*SETS, "--output_dir", "o", "--generated_dir", "a=.", "a=.."], "two models are called 'a'"),
        ([*SETS, "--output_dir", "o", "--generated_dir", "a b=."], "--generated_dir: 'a b=.' must be NAME=PATH"),
        ([*SETS, "--output_dir", "o", "--generated_dir", "a=.", "--alpha", "0"], "--alpha: 0.0 is not above 0"),
        ([*SETS, "--output_dir", "o", "--generated_dir", "a=.", "--embedder", "vgg"], "--embedder: 'vgg' is not one of"),
        ([*SETS, "--output_dir", "o", "--generated_dir", "a=.", "--embedder", "sscd"], "not a .safetensors file"),
        ([*SETS, "--output_dir", "o", "--generated_dir", "a=.", "--sampler", "full"], "did you mean 'samplers'"),
        ([*SETS, "--output_dir", str(DATA / "finetune" / "o"), "--generated_dir", "a=."], "lies inside --train_data_dir"),
        ([*SETS[:3], SETS[1], "--output_dir", "o", "--generated_dir", "a=."], "nothing is held out"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=message):
        options(*flags)


def test_models_of_one_name_or_called_base_clash(miniature, tuned):
    start = ["--pretrained_model_name_or_path", str(miniature), *SETS, "--output_dir", "o"]
    lora = str(tuned / "lora_noisy")
    with pytest.raises(OptionError, match="two models are called 'base'"):
        options(*start, "--lora", f"base={lora}")
    with pytest.raises(OptionError, match="two models are called 'lora_noisy'"):
        options(*start, "--lora", lora, lora)
    with pytest.raises(OptionError, match="--skip_base: leaves nothing"):
        options(*start, "--skip_base", "true")
    assert [c.name for c in options(*start, "--lora", lora).models()] == [BASE, "lora_noisy"]


def test_a_file_in_the_way_of_the_output_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="can't be written to"):
        options(*SETS, "--generated_dir", f"a={tmp_path}", "--output_dir", str(tmp_path / "file" / "out"))


def test_an_unknown_noise_level_is_refused_before_anything_is_written(miniature, tuned, tmp_path, capsys):
    flags = ["--pretrained_model_name_or_path", str(miniature), "--unet", str(tuned / "whole"), "--samplers", "hybrid"]
    assert main([*flags, *SETS, "--output_dir", str(tmp_path / "out")]) == 2
    assert "--sampler_t_n: needed for the sampler 'hybrid', since 'whole'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_heldout_set_that_was_trained_on_is_refused(tmp_path, capsys):
    train = copy_emoji(tmp_path / "train", 5)
    heldout = copy_emoji(tmp_path / "heldout", 5)
    flags = ["--generated_dir", f"a={train}", "--train_data_dir", str(train), "--heldout_data_dir", str(heldout)]
    assert main([*flags, "--output_dir", str(tmp_path / "out")]) == 2
    assert "every image of" in capsys.readouterr().err


@pytest.mark.slow
def test_without_held_out_images_the_base_model_is_the_control(miniature, tuned, tmp_path):
    out = tmp_path / "report"
    flags = [
        *("--pretrained_model_name_or_path", str(miniature), "--lora", f"noisy={tuned / 'lora_noisy'}"),
        *("--num_images", "60", "--num_inference_steps", "1", "--worst_case", "none", "--batch_size", "30"),
        *(*SETS[:2], "--output_dir", str(out)),
    ]
    assert main(flags) == 0
    report = read_json(out / "report.json")
    assert report["threshold"]["null"] == "base" and report["threshold"]["n_null"] == 60
    assert report["data"]["heldout"] is None and report["controls"]["heldout_to_train"] is None
    figures = report["models"]["noisy"]["samplers"]["full"]
    assert figures["fd_embedding"] is None and figures["similarity_to_heldout"] is None and figures["prdc"] is None
    assert figures["share_above_threshold"] is not None and figures["difference_to_base"] is not None
    assert report["models"]["noisy"]["attacks"] is None
    assert "control is the base model's own images" in report["models"]["noisy"]["verdict"]["text"]
    assert "base model" in (out / "index.html").read_text()
    # With neither, there are figures and no verdict.
    folder = ["--generated_dir", f"x={out / 'generated/noisy/full'}", *SETS[:2], "--output_dir", str(tmp_path / "bare")]
    assert main(folder) == 3
    report = read_json(tmp_path / "bare/report.json")
    assert report["threshold"]["null"] is None and report["models"]["x"]["verdict"]["level"] == "unknown"


def test_stages_stop_where_they_are_told(miniature, tmp_path):
    out = tmp_path / "out"
    flags = ["--pretrained_model_name_or_path", str(miniature), "--num_images", "2", "--num_inference_steps", "1", *SETS]
    flags += ["--output_dir", str(out), "--worst_case", "none"]
    assert main([*flags, "--until", "generate"]) == 0
    assert sorted(p.name for p in out.iterdir()) == [".lock", "generated"]
    assert main([*flags, "--until", "embed"]) == 0
    assert sorted(p.name for p in out.iterdir()) == [".lock", "embeddings", "generated"]


def test_seeds_and_the_clip_score_are_reported(miniature, clip_model, tmp_path):
    flags = ["--pretrained_model_name_or_path", str(miniature), "--num_images", "3", "--num_seeds", "2", *SETS]
    flags += ["--num_inference_steps", "1", "--worst_case", "none", "--skip_attacks", "true", "--seed", "5"]
    assert main([*flags, "--clip_score_model", str(clip_model), "--output_dir", str(tmp_path / "out")]) == 0
    figures = read_json(tmp_path / "out/report.json")["models"]["base"]["samplers"]["full"]
    assert [(s["seed"], s["n"]) for s in figures["seeds"]] == [(5, 3), (6, 3)] and figures["n_generated"] == 6
    assert figures["clip_score"]["n"] == 6 and 0 <= figures["clip_score"]["mean"] <= 100


def test_every_checkpoint_of_a_run_is_evaluated_in_one_call(miniature, tuned, tmp_path):
    run = tmp_path / "run"
    for step in (10, 5):
        shutil.copytree(tuned / "lora_noisy", run / f"checkpoint-{step}")
    flags = ["--pretrained_model_name_or_path", str(miniature), "--checkpoints", f"mine={run}", *SETS]
    flags += ["--num_images", "2", "--num_inference_steps", "1", "--worst_case", "none", "--skip_attacks", "true"]
    assert main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    models = read_json(tmp_path / "out/report.json")["models"]
    assert [(n, m["run"], m["step"], m["trained_t_n"]) for n, m in models.items()] == [
        ("base", None, None, None), ("mine-5", "mine", 5, 500), ("mine-10", "mine", 10, 500)
    ]  # fmt: skip


def test_what_can_not_end_well_is_refused_before_anything_is_drawn(miniature, tmp_path, capsys):
    heldout = copy_emoji(tmp_path / "heldout", 12, "heldout")
    model = ["--pretrained_model_name_or_path", str(miniature), "--num_images", "2", "--num_inference_steps", "1", *SETS[:2]]
    out = tmp_path / "out"
    assert main([*model, "--heldout_data_dir", str(heldout), "--output_dir", str(out)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--heldout_data_dir: 12 images" in line and "at least 49 are needed" in line and "--alpha 0.077 or more" in line
    assert not (out / "generated").exists()
    weights = tmp_path / "weights"
    weights.mkdir()
    flags = [*model, *SETS[2:], "--embedder", "dinov2", "--embedder_weights", str(weights), "--output_dir", str(out)]
    assert main(flags) == 2
    assert not (out / "generated").exists()


def test_one_training_file_among_many_fails_the_build(tmp_path):
    folder = tmp_path / "generated"
    folder.mkdir()
    for path in sorted((DATA / "pretrain").glob("*.png"))[::25]:
        shutil.copy(path, folder / path.name)
    assert main(given(tmp_path, folder, "--max_excess", "0")) == 3
    shutil.copy(next((DATA / "finetune").glob("*.png")), folder / "copied.png")
    assert main(given(tmp_path, folder, "--max_excess", "0")) == 1
    model = read_json(tmp_path / "out/report.json")["models"]["model"]
    assert model["verdict"]["level"] == "above" and model["samplers"]["given"]["contained"]["same_file"] == 1
    assert "Copies found without a threshold" in (tmp_path / "out/index.html").read_text()


def test_one_image_many_times_is_one_image(tmp_path):
    folder = copy_emoji(tmp_path / "generated", 1, "pretrain")
    (folder / "metadata.jsonl").unlink(missing_ok=True)
    (picture,) = folder.glob("*.png")
    for i in range(200):
        shutil.copy(picture, folder / f"again-{i}.png")
    assert main(given(tmp_path, folder, "--max_excess", "0.05")) == 3
    model = read_json(tmp_path / "out/report.json")["models"]["model"]
    figures = model["samplers"]["given"]
    assert (figures["n_generated"], figures["distinct_images"], len(figures["images"])) == (201, 1, 1)
    assert model["verdict"]["level"] != "above" and "201 images are 1 different ones" in model["verdict"]["text"]
