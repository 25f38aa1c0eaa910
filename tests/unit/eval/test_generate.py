"""Images depend on their seed and settings alone: not on batches, interruptions or who else is drawn."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import copy_emoji

from eval.checkpoints import Checkpoint, hash_weights
from eval.drawing import average_images, captions_of, generate_images, plan, read_prompts
from eval.generate import GenerateOptions, main
from eval.images import read_folder
from eval.options import MemorizationOptions
from eval.samplers import own_samplers, samplers_of
from sdxl_ambient.config.parser import load_options
from sdxl_ambient.errors import OptionError, StageError, UserError
from sdxl_ambient.formats.peft import save_lora
from sdxl_ambient.models.lora import add_lora
from sdxl_ambient.provenance import hash_file
from sdxl_ambient.randomness import image_seed

PROMPTS = ["red apple", "green heart", "penguin", "yellow star", "blue car"]


@pytest.fixture(scope="module")
def lora(unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    tuned = copy.deepcopy(unet)
    add_lora(tuned, rank=4, alpha=4, targets=["attention"])
    generator = torch.Generator().manual_seed(0)
    for p in tuned.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    save_lora(tuned, folder, {"t_n": 500})
    return folder


def arguments(miniature, tmp_path, out, *more):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    return [
        *("--pretrained_model_name_or_path", str(miniature), "--prompts_file", str(prompts), "--num_inference_steps", "3"),
        *("--output_dir", str(tmp_path / out), *more),
    ]


def pixels(folder):
    return [np.asarray(Image.open(p)).astype(int) for p in sorted((folder / "images").glob("*.png"))]


def test_batch_size_and_interruption_change_no_image(miniature, tmp_path):
    assert main(arguments(miniature, tmp_path, "a", "--batch_size", "2")) == 0
    assert main(arguments(miniature, tmp_path, "b", "--batch_size", "5")) == 0
    # Another batch size sums in another order: at most one grey level.
    assert max(abs(a - b).max() for a, b in zip(pixels(tmp_path / "a"), pixels(tmp_path / "b"), strict=True)) <= 1
    before = pixels(tmp_path / "a")
    for name in ("images/000003.png", "images/000004.png", "metadata.jsonl"):
        (tmp_path / "a" / name).unlink()
    assert main(arguments(miniature, tmp_path, "a", "--batch_size", "2")) == 0
    assert all(np.array_equal(a, b) for a, b in zip(before, pixels(tmp_path / "a"), strict=True))
    rows = [json.loads(line) for line in (tmp_path / "a" / "metadata.jsonl").read_text().splitlines()]
    assert [r["text"] for r in rows] == PROMPTS
    assert rows[3] == {
        "file_name": "images/000003.png",
        "text": "yellow star",
        "index": 3,
        "seed": image_seed(0, 3),
        "run": 0,
        "sha256": hash_file(tmp_path / "a" / "images/000003.png"),
    }


@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_image_is_drawn_again_and_never_evaluated(miniature, tmp_path, capsys, finished):
    assert main(arguments(miniature, tmp_path, "a")) == 0
    path, rows = tmp_path / "a/images/000002.png", tmp_path / "a/metadata.jsonl"
    want, metadata = path.read_bytes(), rows.read_bytes()
    for damage in (lambda data: data[: len(data) // 2], lambda data: bytes(len(data)), flip):
        path.write_bytes(damage(want))
        if finished:
            with pytest.raises(StageError, match="000002.png is not as it was drawn; draw again"):
                read_folder(tmp_path / "a")
        else:
            rows.unlink()
        assert main(arguments(miniature, tmp_path, "a")) == 0
        assert "000002.png is damaged and is made again" in capsys.readouterr().err
        assert path.read_bytes() == want and rows.read_bytes() == metadata
    path.unlink()
    with pytest.raises(UserError, match="images/000002.png' is not in the folder"):
        read_folder(tmp_path / "a")


def flip(data: bytes) -> bytes:
    """One bit of a PNG's pixels."""
    changed = bytearray(data)
    changed[data.index(b"IDAT") + 20] ^= 1
    return bytes(changed)


def test_a_lora_changes_the_images_and_hybrid_uses_its_own_level(miniature, lora, tmp_path):
    assert main(arguments(miniature, tmp_path, "base")) == 0
    assert main(arguments(miniature, tmp_path, "full", "--lora", str(lora))) == 0
    assert main(arguments(miniature, tmp_path, "hybrid", "--lora", str(lora), "--sampler", "hybrid")) == 0
    base, full, hybrid = (pixels(tmp_path / n) for n in ("base", "full", "hybrid"))
    for a, b in ((base, full), (base, hybrid), (full, hybrid)):
        assert np.mean([abs(x - y).mean() for x, y in zip(a, b, strict=True)]) > 0.5
    settings = json.loads((tmp_path / "hybrid" / "manifest.json").read_text())["settings"]
    assert settings["t_n"] == 500 and settings["lora_weights"] == hash_weights(lora, "lora")


def draw_uniform(prompts, generators):
    return [Image.fromarray(np.full((8, 8, 3), g.initial_seed() % 256, np.uint8)) for g in generators]


def test_a_folder_of_other_settings_is_refused_with_the_difference(tmp_path):
    draws = plan(PROMPTS, 0)
    assert generate_images(tmp_path / "x", {"steps": 25, "seed": 0}, draws, draw_uniform, 2) == 5
    assert generate_images(tmp_path / "x", {"steps": 25, "seed": 0}, draws, None, 2) == 0  # nothing is drawn
    with pytest.raises(StageError, match="steps: stored 25, wanted 50"):
        generate_images(tmp_path / "x", {"steps": 50, "seed": 0}, draws, draw_uniform, 2)


def test_a_foreign_folder_is_not_written_to(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StageError, match="not empty and has no manifest.json"):
        generate_images(tmp_path, {}, plan(PROMPTS, 0), draw_uniform, 2)


def test_an_interruption_keeps_whole_files_only(tmp_path):
    calls = []

    def failing(prompts, generators):
        if calls:
            raise KeyboardInterrupt
        calls.append(prompts)
        return draw_uniform(prompts, generators)

    with pytest.raises(KeyboardInterrupt):
        generate_images(tmp_path / "x", {}, plan(PROMPTS, 0), failing, 2)
    assert sorted(p.name for p in (tmp_path / "x" / "images").iterdir()) == ["000000.png", "000001.png"]
    assert generate_images(tmp_path / "x", {}, plan(PROMPTS, 0), draw_uniform, 2) == 3


def test_plan_spreads_few_images_and_repeats_for_many():
    assert [d.prompt for d in plan(PROMPTS, 0, num_images=2)] == ["red apple", "penguin"]
    many = plan(PROMPTS, 0, num_images=7)
    assert [d.prompt for d in many[5:]] == ["red apple", "green heart"]
    assert len({d.seed for d in many}) == 7
    assert len(plan(PROMPTS, 0, images_per_prompt=3)) == 15
    assert plan(PROMPTS, 1)[0].seed != plan(PROMPTS, 0)[0].seed


def test_prompts_from_files_and_captions(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert read_prompts(tmp_path / "p.jsonl") == ["a", "b"]
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(StageError, match="prompt 2: not a JSON object with a 'text'"):
        read_prompts(tmp_path / "bad.jsonl")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(StageError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")
    folder = copy_emoji(tmp_path / "emoji", 3)
    assert len(captions_of(folder)) == 3
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(StageError, match="no captions to use as prompts"):
        captions_of(folder)


def test_seeds_share_prompts_and_means_take_a_part_of_them():
    draws = plan(PROMPTS, 3, num_images=2, num_seeds=2)
    assert [(d.index, d.prompt, d.run) for d in draws] == [
        (0, "red apple", 3), (1, "penguin", 3), (2, "red apple", 4), (3, "penguin", 4)
    ]  # fmt: skip
    assert [d.seed for d in draws] == [image_seed(3, 0), image_seed(3, 1), image_seed(4, 0), image_seed(4, 1)]
    means = plan(PROMPTS, 0, mean_of=2)
    assert [d.prompt for d in means] == ["red apple", "red apple", "penguin", "penguin"]
    assert len({d.seed for d in means}) == 4
    assert [d.prompt for d in plan(PROMPTS[:1], 0, mean_of=4)] == ["red apple"] * 4


def test_means_are_of_consecutive_images_and_resume(tmp_path):
    draws = plan(PROMPTS[:2], 0, mean_of=2)
    generate_images(tmp_path / "s", {}, draws, draw_uniform, 2)
    (mean,) = average_images(tmp_path / "s", tmp_path / "m", draws, 2)
    greys = [d.seed % 256 for d in draws]
    assert pixels(tmp_path / "m")[0][0, 0].tolist() == [round(sum(greys) / 2)] * 3
    assert (mean.prompt, mean.file) == ("red apple", "images/000000.png")
    assert json.loads((tmp_path / "m/metadata.jsonl").read_text())["text"] == "red apple"
    made = (tmp_path / "m" / mean.file).stat().st_mtime_ns
    average_images(tmp_path / "s", tmp_path / "m", draws, 2)
    assert (tmp_path / "m" / mean.file).stat().st_mtime_ns == made


def evaluation(tmp_path, *flags):
    options = MemorizationOptions()
    for name, value in zip(flags[::2], flags[1::2], strict=True):
        setattr(options, name, value)
    return options


def test_a_level_that_nobody_knows_is_asked_for(lora, tmp_path):
    def levels(checkpoint, modes, t_n):
        return {s.name: s.t_n for s in own_samplers(checkpoint, evaluation(tmp_path, "sampler_t_n", t_n, "samplers", modes))}

    assert levels(Checkpoint("x", lora=lora), ["full", "hybrid"], None) == {"full": None, "hybrid": 500}
    assert levels(Checkpoint("x", lora=lora), ["early_stop"], 300) == {"early_stop": 300}
    with pytest.raises(OptionError, match="--sampler_t_n: needed for the sampler 'hybrid', since 'x' records no"):
        levels(Checkpoint("x", unet=tmp_path), ["hybrid"], None)


def test_the_worst_case_has_every_way_that_applies_once_and_the_users_first(lora, tmp_path):
    def names(checkpoint, *flags):
        return [s.name for s in samplers_of(checkpoint, evaluation(tmp_path, *flags))]

    everything = ["hybrid", "full", "early_stop", "scale_0.5", "scale_1.5", "guidance_1", "mean_4"]
    assert names(Checkpoint("x", lora=lora), "samplers", ["hybrid"]) == everything
    assert names(Checkpoint("x", lora=lora), "guidance_scale", 2.0)[-3:] == ["guidance_1", "guidance_5", "mean_4"]
    assert names(Checkpoint("x", unet=tmp_path)) == ["full", "guidance_1", "mean_4"]  # no scale, and no level is known
    assert names(Checkpoint("base"), "samplers", ["hybrid"]) == ["full", "guidance_1", "mean_4"]
    assert names(Checkpoint("x", lora=lora), "worst_case", "none") == ["full"]
    by_name = {s.name: s for s in samplers_of(Checkpoint("x", lora=lora), evaluation(tmp_path, "lora_scale", 0.8))}
    assert by_name["scale_1.5"].lora_scale == 1.5 and by_name["guidance_1"].lora_scale == 0.8
    # Two steps start at 501: early_stop and hybrid at 700 would have nothing above them.
    high = evaluation(tmp_path, "sampler_t_n", 700)
    assert "hybrid" not in [s.name for s in samplers_of(Checkpoint("x", lora=lora), high, 501)]
    high.samplers = ["hybrid"]
    with pytest.raises(OptionError, match="--sampler_t_n: 700 of 'x' is not below 501, where 25 steps start"):
        samplers_of(Checkpoint("x", lora=lora), high, 501)
    few = samplers_of(Checkpoint("x", lora=lora), evaluation(tmp_path, "worst_case_images", 9))
    assert [s.num_images for s in few] == [None] + [9] * (len(few) - 1)
    assert by_name["guidance_1"].guidance_scale == 1.0 and by_name["full"].guidance_scale == 5.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora", "nowhere"], "--lora: 'nowhere' does not exist"),
        (["--lora", "."], "does not hold pytorch_lora_weights.safetensors"),
        (["--unet", "."], "does not hold a UNet's .safetensors files"),
        (["--num_images", "3", "--images_per_prompt", "2"], "can not be combined with --num_images"),
        (["--resolution", "65"], "--resolution: 65 is not a multiple of 8"),
        (["--device", "abacus"], "--device: 'abacus' is not one of auto, cpu, cuda, cuda:N"),
        (["--sampler", "magic"], "'magic' is not one of full, early_stop, hybrid"),
        (["--batch_size", "0"], "--batch_size: 0 is below"),
        (["--pretrained_model_name_or_path", "./nowhere"], "has no model_index.json"),
    ],
)
def test_wrong_options_are_one_line(miniature, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=message):
        load_options(GenerateOptions, arguments(miniature, tmp_path, "out", *flags))


def test_a_damaged_lora_is_one_line_and_exit_code_2(miniature, tmp_path, capsys):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"rubbish")
    with pytest.raises(SystemExit) as stopped:
        main(arguments(miniature, tmp_path, "out", "--lora", str(tmp_path)))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("eval.generate: error:")


@pytest.mark.parametrize("sampler", ["hybrid", "early_stop"])
def test_a_level_above_the_first_step_is_refused_in_a_line(miniature, lora, tmp_path, capsys, sampler):
    flags = ["--lora", str(lora), "--sampler", sampler, "--sampler_t_n", "900"]
    assert main(arguments(miniature, tmp_path, "out", *flags)) == 2
    assert "--sampler_t_n: 900 of 'out' is not below" in capsys.readouterr().err
