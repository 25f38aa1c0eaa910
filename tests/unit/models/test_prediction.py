"""What a network predicts is told from what it answers, and a scheduler that says otherwise is refused with both figures."""

import copy
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.running import arguments
from support.v_base import make_v_base

from eval.generate import main as generate
from sdxl_ambient.errors import ModelError
from sdxl_ambient.export import main as export
from sdxl_ambient.models import load_schedule, load_unet
from sdxl_ambient.models.prediction import FLOW, _inputs, check_prediction, reading_errors
from sdxl_ambient.noise import PREDICTION_TYPES, NoiseSchedule
from sdxl_ambient.preview.__main__ import main as preview
from train_sdxl_ambient import main as train


class Exact(torch.nn.Module):
    """A network that knows what it is asked about, and answers as it is told to."""

    def __init__(self, schedule, predicts):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.schedule, self.predicts, self.dtype = schedule, predicts, torch.float32
        sizes = dict(cross_attention_dim=8, addition_time_embed_dim=4, projection_class_embeddings_input_dim=32)
        self.config = type("Config", (), dict(sample_size=64, in_channels=4, **sizes))
        self.x_0, self.noise, self.t = _inputs(self, schedule)

    def forward(self, x, t, states, added_cond_kwargs):
        assert states.shape == (len(x), 77, 8) and added_cond_kwargs["text_embeds"].shape == (len(x), 8)
        alpha, sigma = (c(t.long())[:, None, None, None].float() for c in (self.schedule.alpha, self.schedule.sigma))
        answers = {"epsilon": self.noise, "sample": self.x_0, FLOW: self.noise - self.x_0}
        answers["v_prediction"] = alpha * self.noise - sigma * self.x_0
        return type("Output", (), {"sample": answers[self.predicts]})


@pytest.mark.parametrize("predicts", [*PREDICTION_TYPES, FLOW])
def test_the_right_reading_of_an_exact_network_has_no_error(schedule, predicts):
    errors = reading_errors(Exact(schedule, predicts), schedule)
    assert errors.pop(predicts) < 1e-10
    assert min(errors.values()) > 0.3


def test_flow_matching_is_asked_at_the_same_signal_to_noise_on_its_own_path(schedule):
    network = Exact(schedule, FLOW)
    asked = []
    network.register_forward_pre_hook(lambda module, args: asked.append(args[:2]))
    reading_errors(network, schedule)
    (_, t), (z, t_flow) = asked
    s = t_flow.double()[:, None, None, None] / 1000
    alpha, sigma = (c(t.long())[:, None, None, None] for c in (schedule.alpha, schedule.sigma))
    torch.testing.assert_close(s / (1 - s), sigma / alpha, rtol=1e-5, atol=0)
    torch.testing.assert_close(z.double(), (1 - s) * network.x_0 + s * network.noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("predicts", PREDICTION_TYPES)
def test_the_wrong_readings_have_the_errors_of_the_closed_form(schedule, predicts):
    """With f = aε + bx_0, a reading x̂_0 = cx_t + df is (cα + db)x_0 + (cσ + da)ε."""
    a_b = {"epsilon": lambda a, s: (1, 0), "v_prediction": lambda a, s: (a, -s), "sample": lambda a, s: (0, 1)}
    c_d = {"epsilon": lambda a, s: (1 / a, -s / a), "v_prediction": lambda a, s: (a, -s), "sample": lambda a, s: (0, 1)}
    network = Exact(schedule, predicts)
    errors, x_0, noise = reading_errors(network, schedule), network.x_0.double(), network.noise.double()
    alpha, sigma = (c(network.t)[:, None, None, None] for c in (schedule.alpha, schedule.sigma))
    (a, b) = a_b[predicts](alpha, sigma)
    for name in PREDICTION_TYPES:
        c, d = c_d[name](alpha, sigma)
        wrong = (c * alpha + d * b - 1) * x_0 + (c * sigma + d * a) * noise
        wanted = float(wrong.square().mean() / x_0.square().mean())
        assert errors[name] == pytest.approx(wanted, rel=1e-5, abs=1e-10), name


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("predicts", [*PREDICTION_TYPES, FLOW])
@pytest.mark.parametrize("declared", PREDICTION_TYPES)
def test_a_declared_reading_that_is_not_the_networks_is_refused(schedule, predicts, declared, zero_snr):
    bars = schedule.alpha_bar(torch.arange(1000))
    if zero_snr:
        roots = bars.sqrt()
        bars = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    if zero_snr and declared == "epsilon":
        pytest.skip("such a base is refused by its configuration")
    own = NoiseSchedule(bars, declared)
    network = Exact(own, predicts)
    if predicts == declared:
        return check_prediction(network, own, "'model'")
    errors = reading_errors(network, own)
    with pytest.raises(ModelError, match=f"'model' predicts {predicts}, though its scheduler says {declared}: ") as error:
        check_prediction(network, own, "'model'")
    assert re.findall(r"\d\.\d\d|\d+\.\d\d", str(error.value)) == [f"{errors[predicts]:.2f}", f"{errors[declared]:.2f}"]
    remedy = "can't be trained" if predicts == FLOW else f"give --prediction_type {predicts}"
    assert ("a signal left" if zero_snr and predicts == "epsilon" else remedy) in str(error.value)
    with pytest.raises(ModelError, match=f"though --prediction_type says {declared}"):
        check_prediction(network, own, "'model'", declared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_miniature_and_a_network_trained_for_v_are_told_apart(miniature, schedule, v_base, dtype):
    for folder, predicts in ((miniature, "epsilon"), (v_base, "v_prediction")):
        unet = load_unet(folder, dtype=dtype)
        unet.train()
        state, random = copy.deepcopy(unet.state_dict()), torch.get_rng_state()
        errors = reading_errors(unet, schedule)
        assert min(errors, key=errors.get) == predicts
        assert min(e for n, e in errors.items() if n in PREDICTION_TYPES and n != predicts) > 2 * errors[predicts]
        assert unet.training and torch.equal(random, torch.get_rng_state())
        assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())


def test_a_network_that_knows_nothing_yet_is_let_through(unet, schedule):
    """New weights answer noise, and a last layer of zeros nothing; no reading of either is right."""
    for seed in range(3):
        torch.manual_seed(seed)
        blank = type(unet).from_config(unet.config)
        for predicts in PREDICTION_TYPES:
            check_prediction(blank, NoiseSchedule(schedule.alpha_bar(torch.arange(1000)), predicts), "'new'")
        torch.nn.init.zeros_(blank.conv_out.weight), torch.nn.init.zeros_(blank.conv_out.bias)
        for predicts in PREDICTION_TYPES:
            check_prediction(blank, NoiseSchedule(schedule.alpha_bar(torch.arange(1000)), predicts), "'new'")


@pytest.fixture(scope="module")
def v_base(miniature, tmp_path_factory):
    return make_v_base(tmp_path_factory.mktemp("v") / "v", miniature)


@pytest.fixture
def mislabelled(miniature, v_base, tmp_path):
    """Of ε and of v, a base whose scheduler says the other."""

    def make(predicts):
        folder = tmp_path / "mislabelled"
        shutil.copytree({"epsilon": miniature, "v_prediction": v_base}[predicts], folder)
        file = folder / "scheduler/scheduler_config.json"
        other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[predicts]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": other}))
        return folder

    return make


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_every_command_refuses_it_and_is_helped_by_the_option(mislabelled, predicts, emoji, tmp_path, capsys):
    base = mislabelled(predicts)
    message = f"the UNet of '{base}' predicts {predicts}, though its scheduler says"
    model, fix = ["--pretrained_model_name_or_path", str(base)], ["--prediction_type", predicts]
    (tmp_path / "prompts.txt").write_text("a star\n")
    common = [*model, "--train_data_dir", str(emoji), "--resolution", "64", "--output_dir"]
    short = ["--rank", "2", "--max_train_steps", "1", "--report_to", "none", "--noise_key_file", str(tmp_path / "key")]
    look = ["--num_images", "1", "--posterior_samples", "0", "--t_n", "500"]
    drawing = [*model, "--prompts_file", str(tmp_path / "prompts.txt"), "--num_inference_steps", "2", "--output_dir"]
    commands = {
        "run": (train, [*common, str(tmp_path / "run"), *short]),
        "preview": (preview, [*common, str(tmp_path / "preview"), *look]),
        "drawn": (generate, [*drawing, str(tmp_path / "drawn")]),
    }
    for name, (command, words) in commands.items():
        assert command(words) == 2, name
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in line and f"give --prediction_type {predicts}" in line
        assert not list((tmp_path / name).rglob("*.png")) and not list((tmp_path / name).rglob("*lora_weights*"))
        assert command([*words, *fix]) == 0, name
    assert json.loads((tmp_path / "run/training.json").read_text())["prediction_type"] == predicts


def test_the_option_is_checked_alike(miniature, emoji, tmp_path, capsys):
    words = arguments(emoji, tmp_path / "run", max_train_steps=1, prediction_type="v_prediction")
    assert train(words) == 2
    assert "predicts epsilon, though --prediction_type says v_prediction" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train([*words, "--prediction_type", "noise"])
    assert "--prediction_type" in capsys.readouterr().err


def test_a_single_file_without_its_mark_does_not_come_out_as_epsilon(v_base, emoji, tmp_path, capsys):
    """Mergers and old scripts drop the empty tensor that says v."""
    file = tmp_path / "v.safetensors"
    words = ["--unet", str(v_base / "unet"), "--pretrained_model_name_or_path", str(v_base), "--format", "single_file"]
    assert export([*words, "--output", str(file)]) == 0
    assert load_schedule(file).prediction_type == "v_prediction"
    assert train(arguments(emoji, tmp_path / "marked", max_train_steps=1, pretrained_model_name_or_path=file)) == 0
    state = load_file(file)
    state.pop("v_pred")
    save_file(state, tmp_path / "bare.safetensors")
    bare = arguments(emoji, tmp_path / "run", max_train_steps=1, pretrained_model_name_or_path=tmp_path / "bare.safetensors")
    assert train(bare) == 2
    assert "predicts v_prediction, though its scheduler says epsilon" in capsys.readouterr().err
    assert train([*bare, "--prediction_type", "v_prediction"]) == 0


def test_a_full_run_with_the_option_carries_it_into_what_is_made_of_it(mislabelled, emoji, tmp_path):
    base, run = mislabelled("v_prediction"), tmp_path / "run"
    options = dict(finetune="full", rank=None, lora_alpha=None, lora_dropout=None, pretrained_model_name_or_path=base)
    assert train(arguments(emoji, run, **options, max_train_steps=1, prediction_type="v_prediction")) == 0
    assert json.loads((run / "scheduler/scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    words = ["--unet", str(run), "--pretrained_model_name_or_path", str(base), "--output"]
    assert export([*words, str(tmp_path / "refused"), "--format", "pipeline"]) == 2
    fix = ["--prediction_type", "v_prediction"]
    assert export([*words, str(tmp_path / "model"), "--format", "pipeline", *fix]) == 0
    assert load_schedule(tmp_path / "model").prediction_type == "v_prediction"
    assert export([*words, str(tmp_path / "model.safetensors"), "--format", "single_file", *fix]) == 0
    assert load_schedule(tmp_path / "model.safetensors").prediction_type == "v_prediction"


def test_a_network_that_gives_no_numbers_is_refused(unet, schedule):
    """A LoRA of huge weights would draw black pictures, in which nothing is found copied."""
    broken = copy.deepcopy(unet)
    with torch.no_grad():
        for p in broken.parameters():
            p.mul_(1e15)
    with pytest.raises(ModelError, match="the UNet of 'huge' gives values that are not finite"):
        check_prediction(broken, schedule, "'huge'")


def test_no_advice_leads_in_a_circle(schedule):
    bars = schedule.alpha_bar(torch.arange(1000)).sqrt()
    bars = ((bars - bars[-1]) * bars[0] / (bars[0] - bars[-1])) ** 2
    own = NoiseSchedule(bars, "v_prediction")
    with pytest.raises(ModelError, match="needs a schedule whose last level has a signal left"):
        check_prediction(Exact(own, "epsilon"), own, "'x'")


def test_an_export_asks_a_network_that_records_nothing(v_base, miniature, tmp_path, capsys):
    words = ["--unet", str(v_base / "unet"), "--pretrained_model_name_or_path", str(miniature), "--format", "single_file"]
    assert export([*words, "--output", str(tmp_path / "x.safetensors")]) == 2
    assert "predicts v_prediction, though its scheduler says epsilon" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
    fix = ["--prediction_type", "v_prediction"]
    assert export([*words, "--output", str(tmp_path / "x.safetensors"), *fix]) == 0
    assert load_schedule(tmp_path / "x.safetensors").prediction_type == "v_prediction"
