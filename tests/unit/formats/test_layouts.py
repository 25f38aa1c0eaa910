"""One LoRA in every layout that is read: training and sampling make the same model of it, or refuse it in one line."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from safetensors.torch import load_file
from support.lora_files import LORA, PATTERNS, all_outputs, as_kohya, randomize, write

from eval.checkpoints import check_checkpoint
from eval.checkpoints import weight_files as evaluated_files
from sdxl_ambient.errors import InterchangeError, ModelError, OptionError
from sdxl_ambient.formats.attach import start_from
from sdxl_ambient.formats.lora_export import export_lora
from sdxl_ambient.formats.peft import save_lora
from sdxl_ambient.hub.upload import weight_files as uploaded_files
from sdxl_ambient.models.lora import LORA_TARGETS, add_text_lora
from sdxl_ambient.pipeline import load_pipeline

# Alpha is the rank, for layouts that have no place for it.
ATTENTION = dict(r=4, lora_alpha=4, target_modules=LORA_TARGETS["attention"])
EVERYTHING = dict(r=4, lora_alpha=6, target_modules=[*LORA_TARGETS["all"], "conv_in"], **PATTERNS)


@pytest.fixture(scope="module")
def trained(miniature, tmp_path_factory):
    """What text encoders and UNet give with a trained LoRA, and its file as we save it."""
    kinds = {
        "attention": (ATTENTION, False),
        "everything": (EVERYTHING, False),
        "dora": ({**EVERYTHING, "use_dora": True}, False),
        "text": (ATTENTION, True),
    }
    trained = {}
    for seed, (kind, (keywords, text)) in enumerate(kinds.items()):
        pipe = load_pipeline(str(miniature))
        encoders = [pipe.text_encoder, pipe.text_encoder_2]
        pipe.unet.add_adapter(LoraConfig(**keywords))
        if text:
            add_text_lora(encoders, rank=3, alpha=3)
        for model in (pipe.unet, *encoders):
            randomize(model, seed)
        file = save_lora(pipe.unet, tmp_path_factory.mktemp(kind), {"t_n": 437}, encoders if text else None)
        trained[kind] = all_outputs(pipe), file
    return trained


def lora_down_up(name):
    """diffusers' names since 0.18: ``to_q.lora.down``, of text encoders ``q_proj.lora_linear_layer.down``."""
    inner = "lora" if name.startswith("unet.") else "lora_linear_layer"
    return name.replace("lora_A", f"{inner}.down").replace("lora_B", f"{inner}.up")


def processors(name):
    """diffusers' first names, of its attention processors: ``attn1.processor.to_q_lora.down``."""
    for target, old in (("to_out.0", "to_out"), ("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v")):
        name = name.replace(f".{target}.lora_", f".processor.{old}_lora_")
    for target in ("q", "k", "v", "out"):
        name = name.replace(f".{target}_proj.lora_", f".to_{target}_lora_")
    return name.replace("lora_A", "lora.down").replace("lora_B", "lora.up")


def unprocessed(name):
    """The same without the processors, as they were called in between."""
    return processors(name).replace(".processor.", ".")


def renamed(file, name):
    return {name(k): v for k, v in load_file(file).items()}


# Layout → which LoRA, and the tensors and metadata of its file out of ours.
LAYOUTS = {
    "ours": ("everything", None),
    "ours, DoRA": ("dora", None),
    "ours, all parts": ("text", None),
    "peft": ("attention", lambda file, config: (load_file(file), None)),
    "diffusers": ("attention", lambda file, config: (renamed(file, lora_down_up), None)),
    "diffusers, all parts": ("text", lambda file, config: (renamed(file, lora_down_up), None)),
    "attention processors": ("attention", lambda file, config: (renamed(file, processors), None)),
    "attention processors, all parts": ("text", lambda file, config: (renamed(file, processors), None)),
    "processors' projections": ("attention", lambda file, config: (renamed(file, unprocessed), None)),
    "kohya": ("everything", lambda file, config: as_kohya(file, config=config)),
    "kohya, diffusers' blocks": ("everything", lambda file, config: as_kohya(file, "diffusers", config=config)),
    "kohya, DoRA": ("dora", lambda file, config: as_kohya(file, config=config)),
    "kohya, all parts": ("text", lambda file, config: as_kohya(file, config=config)),
}


def assert_draws_like(pipe, wanted):
    for one, other in zip(all_outputs(pipe), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_sampling_and_export_make_the_same_model_of_a_file(miniature, unet, trained, tmp_path, layout):
    kind, convert = LAYOUTS[layout]
    wanted, file = trained[kind]
    if convert is not None:
        (tmp_path / "style").mkdir()
        file = write(tmp_path / "style" / "style.safetensors", *convert(file, dict(unet.config)))
    check_checkpoint("lora", file)
    assert evaluated_files(file, "lora") == evaluated_files(file.parent, "lora") == [file]
    assert_draws_like(load_pipeline(str(miniature), lora=file.parent), wanted)
    training = load_pipeline(str(miniature))
    start_from(training.unet, file.parent, (training.text_encoder, training.text_encoder_2) if kind == "text" else ())
    assert_draws_like(training, wanted)
    # Exported, it is what the stock loader takes, and what a run leaves to be uploaded.
    export_lora(file, tmp_path / "out", format="peft", config=dict(unet.config))
    assert uploaded_files(tmp_path / "out") == [tmp_path / "out" / LORA]
    stock = StableDiffusionXLPipeline.from_pretrained(miniature, add_watermarker=False)
    stock.load_lora_weights(tmp_path / "out")
    assert_draws_like(stock, wanted)


def test_the_loras_change_what_they_are_meant_to(miniature, trained):
    before = all_outputs(load_pipeline(str(miniature)))
    for kind, (wanted, _) in trained.items():
        assert (wanted[2] - before[2]).abs().max() > 1e-2
        assert [torch.equal(a, b) for a, b in zip(wanted[:2], before[:2], strict=True)] == [kind != "text"] * 2


# -- refused, by all alike --------------------------------------------------------------------------------------------


def unprefixed(state):
    return {name.removeprefix("unet."): tensor for name, tensor in state.items()}


def twice(state):
    name = next(iter(state))
    return {**state, processors(name): state[name].clone()}


UNKNOWN = "no weight of a LoRA of SDXL"
REFUSED = {
    "peft, without a prefix": (lambda s: unprefixed(s), UNKNOWN),
    "diffusers, without a prefix": (lambda s: unprefixed({lora_down_up(k): v for k, v in s.items()}), UNKNOWN),
    "attention processors, without a prefix": (lambda s: unprefixed({processors(k): v for k, v in s.items()}), UNKNOWN),
    "two names for one weight": (twice, "the file mixes two layouts"),
    "an alpha beside diffusers' names": (lambda s: {**s, "unet.conv_in.alpha": torch.ones(())}, UNKNOWN),
    "another kind of adapter": (lambda s: {**s, "unet.conv_in.lokr_w1": torch.ones(1, 1)}, UNKNOWN),
    "another model's module": (
        lambda s: {k.replace("down_blocks.2", "down_blocks.7"): v for k, v in s.items()},
        "is no module of the base model's UNet",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_refuses_all_refuse_for_the_same_reason(miniature, unet, trained, tmp_path, case):
    change, message = REFUSED[case]
    file = write(tmp_path / "x.safetensors", change(load_file(trained["attention"][1])))
    reasons = []
    for kind, use in [
        (InterchangeError, lambda: start_from(load_pipeline(str(miniature)).unet, file)),
        (ModelError, lambda: load_pipeline(str(miniature), lora=file)),
        (InterchangeError, lambda: export_lora(file, tmp_path / "out", format="peft", config=dict(unet.config))),
    ]:
        with pytest.raises(kind, match=message) as error:
            use()
        assert "\n" not in str(error.value)
        reasons.append(str(error.value).rpartition(f"{file}: ")[2])
    assert len(set(reasons)) == 1 and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "does not hold pytorch_lora_weights.safetensors"),
        (["a", "b"], "holds 2 .safetensors files; give one of them"),
        (None, "does not exist"),
    ],
)
def test_a_place_without_a_lora_is_refused_by_all_alike(miniature, unet, trained, tmp_path, names, message):
    folder = tmp_path / "loras"
    if names is not None:
        folder.mkdir()
    for name in names or ():
        write(folder / f"{name}.safetensors", load_file(trained["attention"][1]))
    for kind, use in [
        (InterchangeError, lambda: start_from(unet, folder)),
        (ModelError, lambda: load_pipeline(str(miniature), lora=folder)),
        (InterchangeError, lambda: export_lora(folder, tmp_path / "out", format="peft", config=dict(unet.config))),
        (OptionError, lambda: check_checkpoint("lora", folder)),
    ]:
        with pytest.raises(kind, match=f"'{folder}' {message}") as error:
            use()
        assert "\n" not in str(error.value)
