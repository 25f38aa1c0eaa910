"""Attacks on the weights: exact where the answer is known, and on the miniature, whose pre-training set is known."""

import json

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, copy_emoji
from diffusers import DDPMScheduler

from eval.attack import attack_figures, evenly, main
from eval.denoise import denoising_errors, image_generator, reconstruct
from eval.images import read_folder
from sdxl_ambient.noise import CLEAN, NoiseSchedule
from sdxl_ambient.randomness import Randomness

SDXL = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def sdxl(prediction_type="epsilon"):
    return NoiseSchedule.from_scheduler(DDPMScheduler(**SDXL, prediction_type=prediction_type))


def generators(count, t=500, seed=0):
    return [image_generator(f"{i:064x}", t, seed) for i in range(count)]


def test_noise_belongs_to_the_file_the_level_and_the_seed():
    draws = {
        key: torch.randn(3, generator=image_generator(*key)).tolist()
        for key in [("a", 500, 0), ("b", 500, 0), ("a", 501, 0), ("a", 500, 1)]
    }
    assert len({tuple(d) for d in draws.values()}) == 4
    assert torch.randn(3, generator=image_generator("a", 500, 0)).tolist() == draws["a", 500, 0]


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


def test_members_are_told_by_low_errors_and_high_similarities():
    low, high = np.array([0.1, 0.2]), np.array([0.3, 0.4])
    figures = attack_figures({"error/500": low, "one_step/500": low}, {"error/500": high, "one_step/500": high})
    assert figures["error/500"]["auc"] == 1 and figures["one_step/500"]["auc"] == 0
    assert figures["error/500"]["mean_train"] == pytest.approx(0.15) and figures["error/500"]["tpr_at_1_fpr"] == 1


def test_a_sample_of_a_set_comes_from_all_over(tmp_path):
    images = read_folder(copy_emoji(tmp_path / "a", 10))
    assert [images.name(i) for i in (0, 2, 5, 7)] == [evenly(images, 4).name(i) for i in range(4)]
    assert len(evenly(images, 99)) == 10


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
    assert found["pretrain"]["error/500"]["n_train"] == 16
    # A second run reads what is there; another question is refused.
    before = (tmp_path / "out-finetune/attack.json").stat().st_mtime_ns
    assert main(line) == 0 and (tmp_path / "out-finetune/attack.json").stat().st_mtime_ns == before
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
