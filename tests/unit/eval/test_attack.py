"""Attacks on the weights: exact where the answer is known, and on the miniature, whose pre-training set is known."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from support.pictures import REPOSITORY, copy_emoji
from support.running import process_env

from eval.attack import AttackCommandOptions, main
from eval.attacks.inpaint import hole, inpaint, painted_over
from eval.attacks.measures import conditional_magnitude, denoising_errors, reconstruct
from eval.attacks.model import LoadedModel
from eval.attacks.run import attack_settings, run_attacks, run_attacks_on_sets
from eval.checkpoints import Checkpoint
from eval.embedders.registry import load_embedder
from eval.images import read_folder
from sdxl_ambient.config.parser import load_options
from sdxl_ambient.errors import StageError
from sdxl_ambient.levels import CLEAN
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.posterior import spaced_times
from sdxl_ambient.provenance import hash_json
from sdxl_ambient.randomness import Randomness, attack_generator

SDXL = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def sdxl(prediction_type="epsilon"):
    return NoiseSchedule.from_scheduler(DDPMScheduler(**SDXL, prediction_type=prediction_type))


def generators(count, t=500, seed=0):
    return [attack_generator(f"{i:064x}", t, seed) for i in range(count)]


def test_noise_belongs_to_the_file_the_level_and_the_seed():
    draws = {
        key: torch.randn(3, generator=attack_generator(*key)).tolist()
        for key in [("a", 500, 0), ("b", 500, 0), ("a", 501, 0), ("a", 500, 1)]
    }
    assert len({tuple(d) for d in draws.values()}) == 4
    assert torch.randn(3, generator=attack_generator("a", 500, 0)).tolist() == draws["a", 500, 0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_denoising_error_is_that_of_epsilon(prediction_type):
    """A network that knows x_0 has no error; one that is off by a constant c in ε has c²."""
    schedule, x_0 = sdxl(prediction_type), torch.randn(3, 4, 8, 8, dtype=torch.float64)

    def network(offset):
        def denoise(x_t, t):
            alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
            epsilon = (x_t - alpha * x_0) / sigma + offset
            found = (x_t - sigma * epsilon) / alpha
            return {"epsilon": epsilon, "sample": found, "v_prediction": alpha * epsilon - sigma * found}[prediction_type]

        return denoise

    exact = denoising_errors(network(0.0), schedule, x_0, 500, generators(3))
    off = denoising_errors(network(0.3), schedule, x_0, 500, generators(3))
    torch.testing.assert_close(exact, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(off, torch.full((3,), 0.09, dtype=torch.float64))


def test_reconstructions_start_from_the_images_own_noise_and_not_from_its_batch():
    schedule, x_0 = sdxl(), torch.randn(3, 4, 8, 8)
    seen = []

    def denoise(x_t, t):
        seen.append((x_t, t))
        return x_t * 0.5

    found = reconstruct(denoise, schedule, x_0, 700, generators(3, 700), "one_step")
    level, clean = torch.full((3,), 700), torch.full((3,), CLEAN)
    noise = Randomness(generators(3, 700), 3).normal(x_0)
    torch.testing.assert_close(seen[0][0], schedule.renoise(x_0, clean, level, noise))
    torch.testing.assert_close(found, schedule.x_0(seen[0][0] * 0.5, seen[0][0], level))
    for mode in ("one_step", "posterior"):
        together = reconstruct(denoise, schedule, x_0, 700, generators(3, 700), mode, 5)
        alone = reconstruct(denoise, schedule, x_0[2:], 700, generators(3, 700)[2:], mode, 5)
        torch.testing.assert_close(alone[0], together[2])
    assert len({int(t[0]) for _, t in seen[-5:]}) == 5  # five levels, from t down
    with pytest.raises(ValueError, match="'guess' is not one of one_step, posterior"):
        reconstruct(denoise, schedule, x_0, 700, generators(3), "guess")


# -- the magnitude ------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 5.0])
def test_a_caption_that_adds_a_constant_pulls_with_its_norm(guidance_scale):
    """‖ε(c) − ε(∅)‖ = c √d at every step, wherever the trajectory runs."""
    noise = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    constant = torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64).reshape(-1, 1, 1, 1)
    told, untold = (lambda x, t: 0.5 * x + constant), (lambda x, t: 0.5 * x)
    found = conditional_magnitude(told, untold, sdxl(), noise, 7, guidance_scale)
    torch.testing.assert_close(found, torch.tensor([0, 1.6, 4.8], dtype=torch.float64), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("guidance_scale", [0.5, 3.0])
def test_the_magnitude_is_taken_along_the_guided_trajectory(prediction_type, guidance_scale):
    """Networks that are sure of x_0 = b with the caption and a without: pulls of α/σ ‖b − a‖ towards a + w (b − a)."""
    schedule, steps = sdxl(prediction_type), 6
    a, b, noise = torch.randn(3, 2, 4, 4, 4, dtype=torch.float64)
    seen = []

    def network(x_0):
        def denoise(x_t, t):
            seen.append((x_t, t))
            alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
            epsilon = (x_t - alpha * x_0) / sigma
            return {"epsilon": epsilon, "sample": x_0, "v_prediction": alpha * epsilon - sigma * x_0}[prediction_type]

        return denoise

    found = conditional_magnitude(network(b), network(a), schedule, noise, steps, guidance_scale)
    times = spaced_times(torch.tensor([999]), torch.tensor([CLEAN]), steps)[:-1, 0]
    assert len(times) == steps and [int(t[0]) for _, t in seen[::2]] == times.tolist()
    pull = (schedule.alpha(times) / schedule.sigma(times)).mean() * (b - a).flatten(1).norm(dim=1)
    torch.testing.assert_close(found, pull)
    # The noise of a deterministic trajectory to a fixed x_0 stays what it was.
    goal = a + max(1.0, guidance_scale) * (b - a)
    (first, t), (last, s) = seen[0], seen[-1]
    torch.testing.assert_close(first, noise)
    torch.testing.assert_close(schedule.observe(goal, s, (noise - schedule.alpha(t)[0] * goal) / schedule.sigma(t)[0]), last)


# -- the mask -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject(miniature):
    from sdxl_ambient.pipeline import load_pipeline

    return LoadedModel(load_pipeline(str(miniature)), 64)


@pytest.fixture(scope="module")
def squares(subject):
    from sdxl_ambient.images.load import load_rgb

    images = read_folder(REPOSITORY / "miniature/data/heldout")
    return [subject.square(load_rgb(record.path)) for record in images.records[:3]]


def fill(subject, images, prompts, **changes):
    box = hole(64, 0.5, 4)
    how = {"steps": 3, "guidance_scale": 4.0, **changes}
    return [np.asarray(i, int) for i in inpaint(subject, images, prompts, generators(len(images), 999), box, **how)]


def test_nothing_of_what_the_hole_hides_reaches_the_result(subject, squares):
    box = hole(64, 0.5, 4)
    other = [square.copy() for square in squares]
    for image, colour in zip(other, [(255, 0, 0), (0, 0, 0), (3, 200, 90)], strict=True):
        image.paste(colour, box)
    prompts = ["a red heart", None, "a cat"]
    found, again = fill(subject, squares, prompts), fill(subject, other, prompts)
    for one, same in zip(found, again, strict=True):
        assert np.array_equal(one, same)
    # A pixel next to the hole does.
    other[0].putpixel((15, 15), (0, 255, 0))
    assert not np.array_equal(fill(subject, other, prompts)[0], found[0])


def test_the_surroundings_are_kept_and_the_hole_is_made_anew(subject, squares):
    before = subject.pipe.scheduler.timesteps.clone(), subject.pipe.vae.dtype, subject.pipe.unet.dtype
    found, other = (fill(subject, squares, ["a cat"] * 3, guidance_scale=g) for g in (4.0, 1.0))
    outside = np.ones((64, 64), bool)
    outside[12:52, 12:52] = False  # the decoder sees a latent further than the hole
    shown = subject.decode(subject.encode([painted_over(square, hole(64, 0.5, 4)) for square in squares]))
    for one, unguided, picture in zip(found, other, shown, strict=True):
        difference = np.abs(one - np.asarray(picture, int)).mean(2)
        assert difference[outside].mean() < 3 and difference[16:48, 16:48].mean() > 10
        assert not np.array_equal(one[16:48, 16:48], unguided[16:48, 16:48])
    # What is shared with the stock pipeline is as it was.
    after = subject.pipe.scheduler.timesteps, subject.pipe.vae.dtype, subject.pipe.unet.dtype
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_what_a_hole_is_filled_with_does_not_depend_on_the_batch(subject, squares):
    prompts = ["a cat", None, "a dog"]
    together = fill(subject, squares, prompts)
    (alone,) = (
        np.asarray(i, int)
        for i in inpaint(subject, squares[2:], prompts[2:], generators(3, 999)[2:], hole(64, 0.5, 4), 3, 4.0)
    )
    assert np.abs(together[2] - alone).max() <= 1
    # Without a prompt there is nothing to guide to.
    first, second = (fill(subject, squares, [None] * 3, guidance_scale=g)[0] for g in (1.0, 9.0))
    assert np.array_equal(first, second)


# -- sets ---------------------------------------------------------------------------


def test_a_sample_of_a_set_comes_from_all_over(tmp_path):
    images = read_folder(copy_emoji(tmp_path / "a", 10))
    assert [images.name(i) for i in (0, 2, 5, 7)] == [images.thinned(4).name(i) for i in range(4)]
    assert len(images.thinned(99)) == 10


def options(*more):
    required = [f"--{name}" for name in ("train_data_dir", "heldout_data_dir", "output_dir")]
    paths = [text for name in required for text in (name, "anywhere")]
    base = ["--pretrained_model_name_or_path", str(REPOSITORY / "miniature/pipeline"), "--resolution", "64"]
    level = [] if "--attack_t" in more else ["--attack_t", "500"]
    return load_options(AttackCommandOptions, [*base, *paths, *level, "--attack_steps", "2", *more])


def test_images_without_a_caption_are_left_out_of_the_magnitude_alone(subject, tmp_path):
    images = read_folder(copy_emoji(tmp_path / "a", 3))
    images.records[1] = replace(images.records[1], captions=())
    embedder, asked = load_embedder("pixel"), options()
    count, answers = run_attacks(subject, embedder, images, asked)
    assert count == 3 and {name: len(v) for name, v in answers.items()} == {
        "error/500": 3, "one_step/500": 3, "posterior/500": 3, "mask": 3, "magnitude": 2,
    }  # fmt: skip
    # Nor do the others' answers hang on it.
    few = options("--attacks", "magnitude")
    alone = run_attacks(subject, embedder, images.subset([2]), few)[1]["magnitude"]
    np.testing.assert_allclose(alone, answers["magnitude"][1:], rtol=1e-4)
    # A set without any caption takes the attack from both.
    silent = read_folder(copy_emoji(tmp_path / "b", 2, "heldout"))
    silent.records = [replace(record, captions=()) for record in silent.records]
    sets = {"train": images, "heldout": silent}
    found = run_attacks_on_sets(
        subject, embedder, sets, options("--attacks", "magnitude", "noise", "--attack_modes", "one_step")
    )
    assert [list(answers) for answers in found.values()] == [["error/500", "one_step/500"]] * 2
    assert found["train"]["error/500"].dtype == np.float64
    with pytest.raises(StageError, match="magnitude needs captions"):
        run_attacks_on_sets(subject, embedder, sets, few)


def test_an_unreadable_image_moves_no_other_into_another_batch(subject, tmp_path, monkeypatch):
    images = read_folder(copy_emoji(tmp_path / "a", 5))
    batches = []

    def note(subject, embedder, one, options):
        batches.append(one.hashes)
        return len(one), {"error/500": np.zeros(len(one), np.float32)}

    monkeypatch.setattr("eval.attacks.run.run_attacks", note)
    run_attacks_on_sets(subject, None, {"train": images, "heldout": images}, options("--batch_size", "2"))
    assert batches == [images.hashes[i : i + 2] for i in (0, 2, 4)] * 2
    monkeypatch.undo()
    images.records[1].path.write_bytes(b"no image")
    few = options("--attacks", "noise", "--attack_modes", "one_step")
    assert len(run_attacks_on_sets(subject, load_embedder("pixel"), {"train": images}, few)["train"]["error/500"]) == 4
    for record in images.records:
        record.path.write_bytes(b"no image")
    with pytest.raises(StageError, match=r"no image left to attack with \(5 left out\)"):
        run_attacks_on_sets(subject, None, {"train": images}, few)


def test_an_interrupted_run_asks_only_the_batches_that_are_left(subject, tmp_path, monkeypatch):
    sets = {
        "train": read_folder(copy_emoji(tmp_path / "a", 5)),
        "heldout": read_folder(copy_emoji(tmp_path / "b", 2, "heldout")),
    }
    asked = []

    def ask(subject, embedder, one, options):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(one.hashes)
        return len(one), {"error/500": np.array([int(h[:6], 16) / 7 for h in one.hashes], np.float32)}

    monkeypatch.setattr("eval.attacks.run.run_attacks", ask)
    how = options("--batch_size", "2")
    with pytest.raises(KeyboardInterrupt):
        run_attacks_on_sets(subject, None, sets, how, parts=tmp_path / "parts")
    done, asked[:] = list(asked), []
    found = run_attacks_on_sets(subject, None, sets, how, parts=tmp_path / "parts")
    assert len(done) == 3 and asked == [sets["heldout"].hashes]
    asked[:] = []
    monkeypatch.setattr("eval.attacks.run.run_attacks", lambda s, e, one, o: (ask(s, e, one, o), asked.clear())[0])
    whole = run_attacks_on_sets(subject, None, sets, how)
    for key in sets:
        np.testing.assert_array_equal(found[key]["error/500"], whole[key]["error/500"])


def test_answers_that_are_not_finite_are_an_error(subject, tmp_path, monkeypatch):
    images = read_folder(copy_emoji(tmp_path / "a", 2))
    monkeypatch.setattr("eval.attacks.run.run_attacks", lambda *_: (2, {"error/500": np.array([1, np.nan], np.float32)}))
    with pytest.raises(StageError, match="error/500 isn't finite; in float16 SDXL needs another VAE"):
        run_attacks_on_sets(subject, None, {"train": images}, options())


def test_settings_are_what_determines_the_answers(tmp_path):
    images, embedder = read_folder(copy_emoji(tmp_path / "a", 2)), load_embedder("pixel")

    def settings(*more):
        return attack_settings(options(*more), Checkpoint("base"), images, images, embedder)

    plain = settings()
    assert settings("--batch_size", "3") == plain == settings("--attacks", "magnitude", "mask", "noise")
    for more in (["--mask_share", "0.4"], ["--guidance_scale", "2"], ["--attacks", "mask"], ["--attack_t", "400"]):
        assert settings(*more) != plain
    noise = settings("--attacks", "noise")
    assert settings("--attacks", "noise", "--mask_share", "0.4", "--guidance_scale", "2") == noise
    magnitude = settings("--attacks", "magnitude")
    assert settings("--attacks", "magnitude", "--attack_t", "400", "--attack_modes", "one_step") == magnitude
    images.records[0] = replace(images.records[0], captions=("something else",))
    assert settings() != plain


# -- the command --------------------------------------------------------------------


def test_two_processes_give_what_one_gives(miniature, tmp_path):
    """Batches of two, an odd number of them, with an image that can't be opened among them."""
    train = copy_emoji(tmp_path / "train", 5)
    next(iter(sorted(train.glob("*.png")))).write_bytes(b"no image")
    line = flags(miniature, tmp_path, "--train_data_dir", str(train), "--batch_size", "2", "--attack_t", "500")
    line[line.index("--attack_steps") + 1] = "2"
    found = []
    for processes in (1, 2):
        out = tmp_path / f"out-{processes}"
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"] if processes > 1 else []
        command = [sys.executable, "-m", *launcher, "eval.attack", *line, "--attack_images", "5", "--output_dir", str(out)]
        run = subprocess.run(command, capture_output=True, text=True, env=process_env(), cwd=REPOSITORY, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
        assert run.stdout.count("attack.json") == 1 and run.stdout.count("mask: AUC") == 1
        found.append(json.loads((out / "attack.json").read_text()))
    assert found[0] == found[1]
    answers = found[0]["answers"]
    assert list(answers["train"]) == ["error/500", "one_step/500", "posterior/500", "mask", "magnitude"]
    assert [len(answers[key]["mask"]) for key in ("train", "heldout")] == [4, 5]


def flags(miniature, tmp_path, *more):
    heldout = tmp_path / "heldout"
    if not heldout.exists():
        copy_emoji(heldout, 16, "heldout")
    return [
        *("--pretrained_model_name_or_path", str(miniature)),
        *("--heldout_data_dir", str(heldout)),
        *("--attack_steps", "4", "--resolution", "64", *more),
    ]


def test_the_miniature_knows_what_it_was_trained_on_and_nothing_else(miniature, tmp_path, capsys):
    """The positive control is real: pre-training pictures against held-out ones; it never saw the fine-tuning set."""
    found = {}
    for split in ("pretrain", "finetune"):
        train = copy_emoji(tmp_path / split, 16, split)
        line = flags(
            miniature,
            tmp_path,
            "--train_data_dir",
            str(train),
            "--output_dir",
            str(tmp_path / f"out-{split}"),
            "--attack_t",
            "500",
        )
        assert main(line) == 0
        found[split] = json.loads((tmp_path / f"out-{split}/attack.json").read_text())["figures"]
    assert found["pretrain"]["error/500"]["auc"] > 0.85 and found["pretrain"]["one_step/500"]["auc"] > 0.7
    assert 0.2 < found["finetune"]["error/500"]["auc"] < 0.8
    assert found["pretrain"]["mask"]["auc"] > 0.85 and 0.2 < found["finetune"]["mask"]["auc"] < 0.8
    assert found["pretrain"]["error/500"]["n_train"] == 16 and found["pretrain"]["error/500"]["gap"] < 0
    # A second run reads what is there; another question is refused.
    before = (tmp_path / "out-finetune/attack.json").stat().st_mtime_ns
    settings = json.loads((tmp_path / "out-finetune/attack.json").read_text())["settings"]
    parts = tmp_path / "out-finetune" / f"parts-{hash_json(settings)[:16]}"
    parts.mkdir()  # as a run leaves it that was killed when all was written
    assert main(line) == 0 and not parts.exists()
    assert (tmp_path / "out-finetune/attack.json").stat().st_mtime_ns == before
    assert main([*line, "--seed", "1"]) == 2
    assert "made with other settings: seed" in capsys.readouterr().err


def test_sets_without_an_image_to_ask_about_are_one_line(miniature, tmp_path, capsys):
    """Every held-out image is a training image."""
    train = copy_emoji(tmp_path / "train", 3, "heldout")
    line = flags(miniature, tmp_path, "--train_data_dir", str(tmp_path / "heldout"), "--output_dir", str(tmp_path / "out"))
    line[line.index("--heldout_data_dir") + 1] = str(train)
    assert main([*line, "--attack_t", "500", "--attack_images", "2"]) == 2
    assert "no image left to attack with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--attack_t", "1000"], "--attack_t: 1000 is above the largest allowed value, 999"),
        (["--attacks", "guess"], "--attacks: 'guess' is not one of noise, mask, magnitude"),
        (["--mask_share", "1"], "--mask_share: 1.0 is not below 1"),
        (["--mask_share", "0"], "--mask_share: 0.0 is not above 0"),
        (["--attack_modes", "guess"], "--attack_modes: 'guess' is not one of one_step, posterior"),
        (["--train_data_dir", "/nowhere"], "'/nowhere' is not a folder"),
        (["--lora", "a", "--unet", "b"], "--unet: can not be combined with --lora"),
    ],
)
def test_wrong_questions_are_one_line(miniature, tmp_path, capsys, more, message):
    try:
        train = [] if "--train_data_dir" in more else ["--train_data_dir", str(REPOSITORY / "miniature/data/finetune")]
        code = main(flags(miniature, tmp_path, *train, "--output_dir", str(tmp_path / "out"), *more))
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr().err.strip()
    assert code == 2 and message in printed and "\n" not in printed
