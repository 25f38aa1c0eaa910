"""One weight that is no number: training, generation, evaluation, attack, export and upload refuse it, with exit code 2."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.lora_files import INFO, LORA, metadata_of
from support.pictures import copy_emoji

from eval.attack import main as attack
from eval.checkpoints import run_checkpoints
from eval.generate import main as generate
from eval.memorization import main as memorization
from sdxl_ambient.errors import HubError, InterchangeError
from sdxl_ambient.export import main as export
from sdxl_ambient.formats.attach import start_from
from sdxl_ambient.formats.peft import save_unet
from sdxl_ambient.hub.upload import push

SPOILED = "holds NaN or infinity"


@pytest.fixture(scope="module")
def bad(loras, unet, tmp_path_factory):
    """A LoRA and a UNet, each with one NaN."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(loras / "plain", folder / "lora")
    save_unet(copy.deepcopy(unet), folder, INFO)
    for file in (folder / "lora" / LORA, folder / "unet/diffusion_pytorch_model.safetensors"):
        state, metadata = load_file(file), metadata_of(file)
        name = sorted(state)[0]
        state = {n: t.clone() for n, t in state.items()}
        state[name].view(-1)[0] = float("nan")
        save_file(state, file, metadata=metadata)
    return {"lora": folder / "lora", "unet": folder / "unet"}


@pytest.mark.parametrize("kind", ["lora", "unet"])
def test_one_nan_is_refused_alike(bad, miniature, tmp_path, capsys, kind):
    train = copy_emoji(tmp_path / "train", 4)
    heldout = copy_emoji(tmp_path / "heldout", 4, "heldout")
    base, output = ["--pretrained_model_name_or_path", str(miniature)], ["--output_dir", str(tmp_path / "out")]
    weights, sets = [f"--{kind}", str(bad[kind])], ["--train_data_dir", str(train), "--heldout_data_dir", str(heldout)]
    made = ["--format", "kohya" if kind == "lora" else "pipeline", "--output", str(tmp_path / "x.safetensors")]
    commands = [
        (generate, [*base, *weights, "--train_data_dir", str(train), *output]),
        (memorization, [*base, *weights, *sets, *output, "--max_excess", "0.1"]),
        (attack, [*base, *weights, *sets, *output]),
        (export, [*base, *weights, *made]),
    ]
    for command, flags in commands:
        try:
            code = command(flags)
        except SystemExit as stopped:
            code = stopped.code
        said = capsys.readouterr().err.strip().splitlines()
        assert code == 2 and SPOILED in said[-1], (command, said)
    assert not (tmp_path / "out").exists() and not (tmp_path / "x.safetensors").exists()


def test_training_does_not_start_from_it_and_it_is_not_uploaded(bad, unet):
    with pytest.raises(InterchangeError, match=f"^--lora: .*{SPOILED}"):
        start_from(copy.deepcopy(unet), bad["lora"])
    with pytest.raises(HubError, match=SPOILED):
        push(bad["lora"], repo_id="a/b")


def test_of_a_run_it_is_left_out_with_a_word(bad, tmp_path):
    run = shutil.copytree(bad["lora"].parent / "lora", tmp_path / "run")
    said: list[str] = []
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        run_checkpoints("a", run, warn=said.append)
    assert len(said) == 1 and SPOILED in said[0]


def test_a_base_part_is_looked_at_before_it_is_linked(miniature, unet, tmp_path, capsys):
    base = shutil.copytree(miniature, tmp_path / "base")
    file = base / "vae/diffusion_pytorch_model.safetensors"
    state = {n: t.clone() for n, t in load_file(file).items()}
    state[sorted(state)[0]].view(-1)[0] = torch.inf
    save_file(state, file)
    save_unet(copy.deepcopy(unet), tmp_path / "tuned", INFO)
    for made in ("pipeline", "single_file"):
        output = tmp_path / f"{made}.safetensors"
        flags = ["--unet", str(tmp_path / "tuned"), "--pretrained_model_name_or_path", str(base), "--format", made]
        assert export([*flags, "--output", str(output)]) == 2 and not output.exists()
        assert SPOILED in capsys.readouterr().err
