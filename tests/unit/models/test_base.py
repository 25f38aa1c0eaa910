"""A base is what its files say, or it is refused before anything is encoded: in one line that says what to do."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_ambient.errors import ModelError
from sdxl_ambient.latents import main as encode
from sdxl_ambient.models.base import DDPM_FAMILY, check_sdxl, load_schedule
from sdxl_ambient.models.load import load_unet
from sdxl_ambient.pipeline import load_pipeline
from sdxl_ambient.preview.__main__ import main as preview
from train_sdxl_ambient import main as train


def edit(path, **values):
    content = json.loads(path.read_text())
    for name, value in values.items():
        if value is GONE:
            content.pop(name, None)
        else:
            content[name] = value
    path.write_text(json.dumps(content))


GONE = object()


@pytest.fixture
def base(miniature, tmp_path):
    """The miniature with another configuration: base(scheduler={…}, unet={…}, index={…})."""

    def make(**files):
        folder = tmp_path / "model" / "base"
        shutil.copytree(miniature, folder)
        places = {"scheduler": "scheduler/scheduler_config.json", "unet": "unet/config.json", "index": "model_index.json"}
        for part, values in files.items():
            edit(folder / places[part], **values)
        return folder

    return make


V_ZERO_SNR = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True)
REFUSED = {
    "EDM": (dict(scheduler=dict(_class_name="EDMEulerScheduler", sigma_data=0.5)), r"EDM's \(EDMEulerScheduler\)"),
    "EDM, DPM": (dict(scheduler=dict(_class_name="EDMDPMSolverMultistepScheduler")), "EDM's"),
    "continuous v": (dict(scheduler=dict(timestep_type="continuous", prediction_type="v_prediction")), "EDM's"),
    "flow": (dict(scheduler=dict(_class_name="FlowMatchEulerDiscreteScheduler", shift=3.0)), "one of flow matching"),
    "flow, as a prediction": (dict(scheduler=dict(prediction_type="flow_prediction")), "one of flow matching"),
    "flow, as a flag": (
        dict(scheduler=dict(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True)), "one of flow matching",
    ),
    "another family": (dict(scheduler=dict(_class_name="CMStochasticIterativeScheduler")), "not known to be DDPM's"),
    "unknown prediction": (
        dict(scheduler=dict(prediction_type="noise")), "prediction_type is 'noise'; allowed are epsilon, v_prediction",
    ),
    "no betas": (dict(scheduler=dict(beta_start=GONE, beta_end=GONE)), "lacks beta_start, beta_end, so its noise levels"),
    "no schedule of betas": (dict(scheduler=dict(beta_schedule=GONE)), "lacks beta_schedule"),
    "betas that are none": (dict(scheduler=dict(beta_start="high")), "scheduler of .* can't be"),
    "no timesteps": (dict(scheduler=dict(num_train_timesteps=None)), "lacks num_train_timesteps"),
    "ε with zero terminal SNR": (
        dict(scheduler=dict(rescale_betas_zero_snr=True)), "predicts ε and has rescale_betas_zero_snr",
    ),
    "inpainting, by its pipeline": (
        dict(index=dict(_class_name="StableDiffusionXLInpaintPipeline")), "is an inpainting model",
    ),
    "inpainting, by its channels": (dict(unet=dict(in_channels=9)), "is an inpainting model"),
    "instruct": (dict(unet=dict(in_channels=8)), "has 8 channels in and 4 out; SDXL's has 4 and 4"),
    "learned variance": (dict(unet=dict(out_channels=8)), "has 4 channels in and 8 out"),
    "LCM's UNet": (dict(unet=dict(time_cond_proj_dim=256)), "consistency-distilled one"),
    "refiner, by its encoders": (
        dict(index=dict(_class_name="StableDiffusionXLImg2ImgPipeline", text_encoder=[None, None])), "SDXL refiner",
    ),
    "refiner, by its score": (
        dict(index=dict(_class_name="StableDiffusionXLImg2ImgPipeline", requires_aesthetics_score=True)), "SDXL refiner",
    ),
    "SD 1.5": (
        dict(index=dict(_class_name="StableDiffusionPipeline"), unet=dict(addition_embed_type=None)),
        "holds a StableDiffusionPipeline, not an SDXL model",
    ),
    "SD 3": (dict(index=dict(_class_name="StableDiffusion3Pipeline")), "holds a StableDiffusion3Pipeline, not an SDXL"),
    "ControlNet": (dict(index=dict(_class_name="StableDiffusionXLControlNetPipeline")), "not an SDXL model"),
    "channels in words": (dict(unet=dict(in_channels="four")), "channels in"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_another_base_is_refused_in_one_line(base, case):
    files, message = REFUSED[case]
    folder = base(**files)
    with pytest.raises(ModelError, match=message) as error:
        check_sdxl(str(folder))
        load_schedule(str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("case", ["EDM", "flow, as a prediction", "inpainting, by its pipeline", "ε with zero terminal SNR"])
def test_every_command_refuses_it_before_it_encodes(base, case, emoji, tmp_path, capsys):
    files, message = REFUSED[case]
    folder, out = base(**files), tmp_path / "out"
    common = ["--pretrained_model_name_or_path", str(folder), "--train_data_dir", str(emoji), "--output_dir", str(out)]
    common += ["--resolution", "64"]
    for command in (encode, preview, lambda words: train([*words, "--max_train_steps", "1", "--report_to", "none"])):
        assert command(common) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "error: " in error and message.split(r" \(")[0] in error
        assert not list(tmp_path.rglob("latents-*")) and not list(out.rglob("*.png"))
    with pytest.raises(ModelError, match=message):
        load_pipeline(str(folder))


ALLOWED = {
    "ε": {},
    "v": dict(scheduler=dict(prediction_type="v_prediction")),
    "v with zero terminal SNR": dict(scheduler=V_ZERO_SNR),
    "x_0": dict(scheduler=dict(prediction_type="sample")),
    "image to image": dict(index=dict(_class_name="StableDiffusionXLImg2ImgPipeline")),
    "betas of its own": dict(
        scheduler=dict(beta_start=None, beta_end=None, beta_schedule=None,
                       trained_betas=[0.001 + 1e-5 * t for t in range(1000)])
    ),
    **{family: dict(scheduler=dict(_class_name=family)) for family in sorted(DDPM_FAMILY)},
}  # fmt: skip


@pytest.mark.parametrize("case", ALLOWED)
def test_a_base_of_the_ddpm_family_is_read_as_its_betas_say(base, case):
    folder = base(**ALLOWED[case])
    check_sdxl(str(folder))
    schedule = load_schedule(str(folder))
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    if (betas := config.get("trained_betas")) is not None:
        betas = torch.tensor(betas, dtype=torch.float64)
    else:
        ends = config["beta_start"] ** 0.5, config["beta_end"] ** 0.5
        betas = torch.linspace(*ends, 1000, dtype=torch.float64) ** 2
    bars = (1 - betas).cumprod(0)
    if config.get("rescale_betas_zero_snr"):  # Lin et al. 2024, algorithm 1
        roots = bars.sqrt()
        bars = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    torch.testing.assert_close(schedule.alpha_bar(torch.arange(1000)), bars, rtol=1e-4, atol=1e-6)
    assert schedule.prediction_type == config.get("prediction_type", "epsilon")


DISTILLED = {
    "LCM": (dict(scheduler=dict(_class_name="LCMScheduler")), "its scheduler is a LCMScheduler"),
    "TCD": (dict(scheduler=dict(_class_name="TCDScheduler")), "its scheduler is a TCDScheduler"),
    "turbo, by its scheduler": (
        dict(scheduler=dict(_class_name="EulerAncestralDiscreteScheduler", timestep_spacing="trailing")), "SDXL-Turbo's",
    ),
    "turbo, by its name": (dict(index=dict(_name_or_path="stabilityai/sdxl-turbo")), "its name has 'turbo'"),
    "lightning": (dict(index=dict(_name_or_path="SDXL-Lightning-4step")), "its name has 'lightning'"),
}  # fmt: skip


@pytest.mark.parametrize("case", DISTILLED)
def test_a_distilled_base_is_warned_of(base, case):
    files, why = DISTILLED[case]
    said = []
    check_sdxl(str(base(**files)), log=said.append)
    assert len(said) == 1 and said[0].startswith("warning: ") and why in said[0] and "\n" not in said[0]


def test_a_plain_base_is_not_warned_of(base):
    said = []
    check_sdxl(str(base()), log=said.append)
    assert said == []


def test_a_full_runs_output_says_how_to_make_a_base_of_it(miniature, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(miniature / "unet", run / "unet")
    with pytest.raises(ModelError, match="It looks like the output folder of a full fine-tune: give the base .* as --unet"):
        check_sdxl(str(run))


@pytest.fixture
def half(base):
    """A folder that holds fp16 weights alone, under diffusers' names of a variant."""
    folder = base()
    for file in folder.rglob("*.safetensors"):
        tensors = {name: t.half() if t.is_floating_point() else t for name, t in load_file(file).items()}
        file.unlink()
        save_file(tensors, file.with_name(f"{file.stem}.fp16.safetensors"), {"format": "pt"})
    return folder


def test_a_folder_of_fp16_weights_alone_is_found_and_said(half, emoji, tmp_path, capsys):
    said = []
    check_sdxl(str(half), log=said.append)
    assert said == [f"note: the base {str(half)!r} holds the variant fp16 alone of unet, vae, text_encoder, text_encoder_2"]
    pipe = load_pipeline(str(half))
    wanted = load_file(half / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert all(torch.equal(value.half(), wanted[name]) for name, value in pipe.unet.state_dict().items())
    words = [
        "--pretrained_model_name_or_path",
        str(half),
        "--train_data_dir",
        str(emoji),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    words += ["--resolution", "64", "--rank", "2", "--max_train_steps", "1", "--report_to", "none"]
    assert train(words) == 0
    assert "holds the variant fp16 alone" in capsys.readouterr().out


def test_both_variants_are_told_apart(half):
    file = half / "unet/diffusion_pytorch_model.fp16.safetensors"
    save_file(
        {name: t.float() * 2 for name, t in load_file(file).items()}, half / "unet/diffusion_pytorch_model.safetensors"
    )
    said = []
    check_sdxl(str(half), log=said.append)
    assert "unet," not in said[0]
    plain, named = (load_unet(half, variant=variant).conv_in.weight for variant in (None, "fp16"))
    assert torch.equal(plain, named * 2)


def test_a_scheduler_whose_weights_are_fine_is_still_refused(base):
    """A base with another schedule trains, draws and saves without an error: its noise is what is wrong."""
    folder = base(scheduler=dict(_class_name="EDMEulerScheduler", beta_start=GONE, beta_end=GONE, beta_schedule=GONE))
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(weights), weights)
    with pytest.raises(ModelError, match="EDM's"):
        load_schedule(str(folder))
