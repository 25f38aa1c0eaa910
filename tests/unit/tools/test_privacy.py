"""What noisy latents give away: closed forms against simulation, the attacks against plain algebra, and figures only."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from support.pictures import copy_emoji

from sdxl_ambient.noise import levels
from sdxl_ambient.privacy import (
    __main__ as privacy,
)
from sdxl_ambient.privacy import (
    accounting,
)
from sdxl_ambient.privacy import (
    attacks as privacy_attacks,
)
from sdxl_ambient.privacy import (
    options as privacy_options,
)
from sdxl_ambient.privacy import (
    run as privacy_run,
)
from sdxl_ambient.privacy import (
    wiener as privacy_wiener,
)
from sdxl_ambient.provenance import read_json

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- several observations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("t, k", [(500, 4), (800, 10), (300, 2)])
def test_the_mean_of_k_draws_is_one_draw_at_the_effective_level(schedule, t, k):
    x_0, z = 0.8 * normal(100_000), normal(k, 100_000, seed=1)
    mean = schedule.observe(x_0.expand(k, -1), levels(t, k), z).mean(0)
    level = accounting.effective_level(schedule, t, k)
    # Log SNR of the mean, measured, against that of the whole levels on either side.
    alpha = float(schedule.alpha(torch.tensor([t])))
    measured = alpha**2 / float((mean - alpha * x_0).var())
    below, above = (accounting.snr(schedule, f(level)) for f in (math.floor, math.ceil))
    assert below * 1.02 > measured > above / 1.02
    assert measured == pytest.approx(k * accounting.snr(schedule, t), rel=0.02)


def test_effective_levels_meet_whole_ones_and_end_at_the_first(schedule):
    for t, s in ((800, 500), (500, 12), (998, 998)):
        ratio = accounting.snr(schedule, s) / accounting.snr(schedule, t)
        assert accounting.effective_level(schedule, t, ratio) == pytest.approx(s, abs=1e-6)
    assert accounting.effective_level(schedule, 0, 2) is None
    found = [accounting.effective_level(schedule, 700, k) for k in privacy_run.OBSERVATIONS]
    assert found[0] == pytest.approx(700, abs=1e-9) and sorted(found, reverse=True) == found


# -- telling two pictures apart ------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [300, 800])
def test_the_error_of_two_candidates_is_that_of_simulation(schedule, t):
    alpha, sigma, draws = *privacy_attacks.coefficients(schedule, t), 20_000
    for distance in (0.3, 1.0, 4.0):
        a = normal(16)
        b = a + distance * torch.nn.functional.normalize(normal(16, seed=1), dim=0)
        x_n = alpha * a + sigma * normal(draws, 16, seed=2)
        wrong = (x_n - alpha * b).square().sum(1) < (x_n - alpha * a).square().sum(1)
        expected = accounting.pair_error(distance, alpha**2 / sigma**2)
        assert float(wrong.double().mean()) == pytest.approx(expected, abs=4 * math.sqrt(0.25 / draws))


def test_the_error_of_two_candidates_by_hand():
    assert accounting.pair_error(0.0, 1.0) == 0.5
    assert accounting.pair_error(np.array([2.0, 20.0]), 1.0) == pytest.approx(
        [0.158655253931457, 7.6198530241605e-24], rel=1e-9
    )
    for error in (0.05, 0.3):
        assert accounting.pair_error(accounting.distance_for_error(error, 0.4), 0.4) == pytest.approx(error, rel=1e-9)


def test_identification_is_the_nearest_candidate():
    candidates, z = normal(7, 12), normal(5, 40, 12, seed=1)
    found = privacy_attacks.identification(candidates, 5, 0.5, 0.8, lambda i: z[i])
    x_n = 0.5 * candidates[:5, None] + 0.8 * z
    distances = (x_n[:, :, None] - 0.5 * candidates).square().sum(-1)  # (5, draws, 7)
    right = torch.arange(5)[:, None]
    assert found["rate"] == pytest.approx(float((distances.argmin(-1) == right).double().mean()), abs=1e-12)
    own = distances.gather(2, right[:, :, None].expand(-1, 40, 1))
    assert found["pair_error"] == pytest.approx(int((distances < own).sum()) / (5 * 40 * 6), abs=1e-12)
    assert found["pair_error"] == pytest.approx(found["pair_error_expected"], abs=0.03)
    assert 0 < found["rate_bound"] < found["rate"] < 1 and found["chance"] == 1 / 7
    assert found["nearest_pair_error_expected"] > found["pair_error_expected"]


# -- zCDP ------------------------------------------------------------------------------------


def test_rho_by_hand():
    # C = 3, α² = 0.2, σ² = 0.8: the sensitivity is 2·√0.2·3, its square 7.2, over 2σ² = 1.6.
    assert accounting.rho(3.0, 0.2 / 0.8) == pytest.approx(4.5, rel=1e-15)
    assert accounting.rho(3.0, 0.2 / 0.8, 10) == pytest.approx(45, rel=1e-15)
    assert accounting.zcdp_epsilon(4.5, math.exp(-2)) == pytest.approx(4.5 + 2 * 3, rel=1e-12)


@pytest.mark.parametrize("order", [1.5, 2.0, 8.0])
def test_rho_bounds_the_renyi_divergence_of_the_worst_pair(order):
    """Two latents of norm C on opposite sides: D_a(P‖Q) = a ρ for every order a, by integration along their line."""
    clip_norm, alpha, sigma = 0.7, 0.6, 0.8
    x = np.linspace(-30, 30, 600_001)
    p, q = (-((x - m * alpha * clip_norm) ** 2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi)) for m in (1, -1))
    divergence = math.log(np.exp(order * p + (1 - order) * q).sum() * (x[1] - x[0])) / (order - 1)
    assert divergence == pytest.approx(order * accounting.rho(clip_norm, alpha**2 / sigma**2), rel=1e-9)


@pytest.mark.parametrize("rho", [1e-3, 0.1, 2.0, 50.0])
def test_epsilon_holds_for_a_gaussian(rho):
    """The exact δ of a Gaussian observation (Balle and Wang 2018, Theorem 8) is at most the one that was asked for."""
    delta, shift = 1e-5, math.sqrt(2 * rho)
    epsilon = accounting.zcdp_epsilon(rho, delta)

    def phi(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    exact = phi(shift / 2 - epsilon / shift) - math.exp(epsilon) * phi(-shift / 2 - epsilon / shift)
    assert 0 <= exact < delta
    assert accounting.gaussian_epsilon(rho, delta) < epsilon
    assert accounting.zcdp_rho(epsilon, delta) == pytest.approx(rho, rel=1e-9)
    signal = accounting.zcdp_snr(epsilon, delta, 12.0)
    assert accounting.zcdp_epsilon(accounting.rho(12.0, signal), delta) == pytest.approx(epsilon, rel=1e-9)


@pytest.mark.parametrize("delta", [1e-5, 1e-2])
@pytest.mark.parametrize("rho", [1e-3, 0.01, 0.1, 1.049, 2.0, 50.0])
def test_the_exact_epsilon_is_that_of_balle_and_wang(rho, delta):
    """δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) with μ = √(2ρ), in closed form (Balle and Wang 2018, Theorem 8)."""
    epsilon, mu = accounting.gaussian_epsilon(rho, delta), math.sqrt(2 * rho)
    exact = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
    assert epsilon == 0 or exact == pytest.approx(delta, rel=1e-6)
    assert epsilon < accounting.zcdp_epsilon(rho, delta)
    if epsilon > 0:
        signal = accounting.gaussian_snr(epsilon, delta, 12.0)
        assert accounting.rho(12.0, signal) == pytest.approx(rho, rel=1e-6)


def test_the_exact_epsilon_and_the_bound_in_figures():
    assert accounting.gaussian_epsilon(1.049, 1e-5) == pytest.approx(6.76, abs=0.005)
    assert accounting.zcdp_epsilon(1.049, 1e-5) == pytest.approx(8.00, abs=0.005)
    assert accounting.gaussian_epsilon(0.01, 1e-5) == pytest.approx(0.50, abs=0.005)
    assert accounting.zcdp_epsilon(0.01, 1e-5) == pytest.approx(0.69, abs=0.005)
    assert accounting.gaussian_epsilon(0.0, 1e-5) == 0  # no signal


def test_no_level_gives_a_meaningful_guarantee_at_the_size_of_sdxl(schedule):
    options = privacy_options.PrivacyOptions()
    norms = {"unit_variance": math.sqrt(options.dimension)}
    whole = privacy_run.accounted(schedule, norms, options.delta)
    assert options.dimension == 65_536 and norms["unit_variance"] == 256
    assert whole["last_level"] == 999 and whole["clip_norms"]["unit_variance"]["last_epsilon"] > 500
    assert whole["clip_norms"]["unit_variance"]["snr_needed"] < whole["last_snr"] / 500
    # The exact figures are better, and no more meaningful.
    exact = whole["clip_norms"]["unit_variance"]
    assert 500 < exact["last_epsilon_exact"] < exact["last_epsilon"]
    assert exact["snr_needed"] < exact["snr_needed_exact"] < whole["last_snr"] / 400


# -- the best linear reconstruction ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", privacy_wiener.WEIGHTS)
def test_the_filter_is_the_dense_one(weight):
    """Σ written out: the references' second moment, and the same over all shifts of them, which is stationary."""
    references, x_n, alpha, sigma = normal(5, 4, 3, 2) + 0.3, normal(2, 4, 3, 2, seed=1), 0.6, 0.8
    mean = references.mean((0, 2, 3))[:, None, None]
    rows = references - mean
    shifted = torch.stack([rows.roll((i, j), (2, 3)).flatten(1) for i in range(3) for j in range(2)]).flatten(0, 1)
    flat = rows.flatten(1)
    covariance = weight * shifted.T @ shifted / len(shifted) + (1 - weight) * flat.T @ flat / len(flat)
    noisy = alpha**2 * covariance + sigma**2 * torch.eye(24, dtype=torch.float64)
    gain = torch.linalg.solve(noisy, alpha * covariance).T
    want = mean + ((x_n - alpha * mean).flatten(1) @ gain.T).view_as(x_n)
    found = privacy_wiener.LinearFilter(references, weight)(x_n, alpha, sigma)
    assert found.dtype == torch.float64
    assert (found - want).abs().max() < 1e-10


def test_the_covariance_that_fits_is_chosen():
    kernel = torch.fft.fft2(torch.exp(-torch.arange(8.0)[:, None] - torch.arange(8.0)).double())
    stationary = torch.fft.ifft2(torch.fft.fft2(normal(12, 4, 8, 8)) * kernel).real
    placed = normal(12, 1, 1, 1, seed=1) * normal(1, 4, 8, 8, seed=2) + normal(12, 1, 1, 1, seed=3) * normal(
        1, 4, 8, 8, seed=4
    )
    assert privacy_wiener.choose_weight(stationary, 0.7, 0.7, 0) >= 0.75
    assert privacy_wiener.choose_weight(placed, 0.7, 0.7, 0) <= 0.25


# -- a run ------------------------------------------------------------------------------------


def command(miniature, folders, **changes) -> list[str]:
    train, reference = folders or (None, None)
    flags = {
        "pretrained_model_name_or_path": miniature, "train_data_dir": train, "reference_data_dir": reference,
        "resolution": 64, "num_images": 2, "posterior_samples": 1, "steps": 2, "device": "cpu",
        "t_n": ("300", "800"), **changes,
    }  # fmt: skip
    words = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three images, and eight others."""
    root = tmp_path_factory.mktemp("data")
    return copy_emoji(root / "train", 3), copy_emoji(root / "reference", 8, "heldout")


@pytest.fixture(scope="module")
def made(miniature, folders, tmp_path_factory):
    """The figures' file of a run. Not to be changed."""
    output = tmp_path_factory.mktemp("made")
    assert privacy.main(command(miniature, folders, output_file=output / "privacy.json", clip_norm=5.0)) == 0
    return output / "privacy.json"


def test_a_run_measures_every_attack(made):
    found = read_json(made)
    assert found["data"]["candidates"] == 11 and found["data"]["dimension"] == 1024
    ceiling = found["data"]["reconstruction"]["vae_round_trip"]["psnr_db"]
    low, high = found["levels"]["300"], found["levels"]["800"]
    for way in ("noisy", "linear", "denoised", "sample"):
        assert ceiling > low["reconstruction"][way]["psnr_db"] > high["reconstruction"][way]["psnr_db"]
    assert low["identification"]["rate"] == 1 and high["identification"]["rate"] > 0.5
    assert list(high["zcdp"]) == ["unit_variance", "clip_norm", "data_max", "data_q50", "data_q05"]
    assert high["zcdp"]["clip_norm"]["rho"]["2"] == pytest.approx(2 * 2 * 25 * high["snr"], rel=1e-12)
    assert "No differential privacy is claimed" in found["note"]


def test_figures_only_are_written(made, folders):
    assert [p.name for p in made.parent.iterdir()] == ["privacy.json"]
    text = made.read_text()
    assert str(folders[0].parent) not in text
    for path in folders[0].iterdir():
        assert path.stem not in text
    assert len(text) < 20_000


def test_the_same_command_gives_the_same_figures_without_the_model_too(made, miniature, folders, capsys):
    assert privacy.main(command(miniature, folders, use_unet="false", t_n="800")) == 0
    printed = capsys.readouterr()
    found, before = json.loads(printed.out), read_json(made)
    assert list(found["levels"]["800"]["reconstruction"]) == ["noisy", "linear"]
    assert found["levels"]["800"]["identification"] == before["levels"]["800"]["identification"]
    for way in ("noisy", "linear"):
        assert found["levels"]["800"]["reconstruction"][way] == before["levels"]["800"]["reconstruction"][way]
    assert "epsilon of one draw" in printed.err and "found among 11 candidates" in printed.err


def test_without_images_there_are_closed_forms(miniature, capsys):
    assert privacy.main(command(miniature, None, t_n=["0", "500"], dimension=16)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"] is None and set(found["levels"]["500"]["zcdp"]) == {"unit_variance"}
    assert found["zcdp"]["clip_norms"]["unit_variance"]["clip_norm"] == 4
    assert found["levels"]["0"]["observations"] == {"1": 0, "2": None, "4": None, "10": None, "100": None}


def test_no_key_is_read_and_a_draw_is_the_same_in_any_number():
    assert not {"noise_key", "draw_z", "key_id"} & (vars(privacy).keys() | vars(accounting).keys())
    pictures = [SimpleNamespace(content=c) for c in "ab"]
    found = privacy_attacks.Attacked(pictures, torch.zeros(2, 4, 8, 8), [], torch.zeros(0))
    four, one = found.noise(0, 0, 500, 4), found.noise(0, 0, 500, 1)
    assert torch.equal(four[:1], one)
    others = [found.noise(1, 0, 500, 1), found.noise(0, 1, 500, 1), found.noise(0, 0, 501, 1), four[1:]]
    assert len({float(z.sum()) for z in torch.cat([one, *others])}) == 7


# -- refusals ------------------------------------------------------------------------------------


def refused(capsys, argv) -> str:
    with pytest.raises(SystemExit) as stop:
        privacy.main(argv)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(t_n=["100", "100"]), "--t_n: 100 is given twice"),
        (dict(t_n="999"), "--t_n: 999 is above the largest allowed value, 998"),
        (dict(delta=1), "--delta: 1.0 is not below 1"),
        (dict(delta=0), "--delta: 0.0 is not above 0"),
        (dict(clip_norm=0), "--clip_norm: 0.0 is not above 0"),
        (dict(num_references=3), "--num_references: 3 is below the smallest allowed value, 4"),
        (dict(device="tpu"), "--device: 'tpu' is not one of auto, cpu, cuda, cuda:N"),
        (dict(train_data_dir="/nowhere"), "--train_data_dir: '/nowhere' is not a folder"),
        (dict(reference_data_dir=None), "--reference_data_dir: goes with --train_data_dir; allowed are both or neither"),
        (dict(pretrained_model_name_or_path=None), "--pretrained_model_name_or_path: a value is required"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_loaded(miniature, folders, capsys, changes, message):
    assert message in refused(capsys, command(miniature, folders, **changes))


def test_other_files_are_not_overwritten(miniature, folders, made, tmp_path, capsys):
    other = tmp_path / "manifest.json"
    for text in ("{}", "[", "[1]"):
        other.write_text(text)
        assert "holds something else" in refused(capsys, command(miniature, folders, output_file=other))
        assert other.read_text() == text
    assert "is a folder" in refused(capsys, command(miniature, folders, output_file=tmp_path))
    again = shutil.copy(made, tmp_path)
    assert privacy.main(command(miniature, None, output_file=again)) == 0
    assert read_json(again)["data"] is None


def test_references_are_other_images(miniature, folders, tmp_path, capsys):
    train = folders[0]
    assert "is --train_data_dir" in refused(capsys, command(miniature, (train, train)))
    shutil.copytree(train, tmp_path / "copy")
    assert privacy.main(command(miniature, (train, tmp_path / "copy"), use_unet="false")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "holds 0 usable images that are not in --train_data_dir; at least 4 are needed" in line
