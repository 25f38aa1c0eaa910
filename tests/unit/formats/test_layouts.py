"""One LoRA in every layout that is read: training and sampling make the same model of it, or refuse it in one line."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from sdxl_ambient.formats.attach import start_from
from sdxl_ambient.formats.kohya import to_kohya
from sdxl_ambient.formats.peft import save_lora
from sdxl_ambient.models.lora import LORA_TARGETS, add_text_lora
from sdxl_ambient.pipeline import load_pipeline

LORA = "pytorch_lora_weights.safetensors"
PARTS = ("unet", "text_encoder", "text_encoder_2")
# Alpha is the rank, for layouts that have no place for it.
ATTENTION = dict(r=4, lora_alpha=4, target_modules=LORA_TARGETS["attention"])
EVERYTHING = dict(
    r=4,
    lora_alpha=6,
    target_modules=[*LORA_TARGETS["all"], "conv_in"],
    rank_pattern={"conv1": 2, "to_k": 3},
    alpha_pattern={"to_q": 0.5, "conv2": 9, "mid_block.attentions.0.proj_in": 1.75},
)

pytestmark = pytest.mark.usefixtures("one_thread")


def randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
        elif "lora_" in name:
            p.data *= 1 + 0.2 * torch.rand(p.shape, generator=generator)


@pytest.fixture(scope="module")
def trained(miniature, tmp_path_factory):
    """Pipelines with a trained LoRA and their files as we save them: of attention alone, of everything, DoRA, all parts."""
    kinds = {
        "attention": (ATTENTION, False),
        "everything": (EVERYTHING, False),
        "dora": ({**EVERYTHING, "use_dora": True}, False),
        "text": (ATTENTION, True),
    }
    found = {}
    for seed, (kind, (keywords, text)) in enumerate(kinds.items()):
        pipe = load_pipeline(str(miniature))
        encoders = [pipe.text_encoder, pipe.text_encoder_2]
        pipe.unet.add_adapter(LoraConfig(**keywords))
        if text:
            add_text_lora(encoders, rank=3, alpha=3)
        for model in (pipe.unet, *encoders):
            randomize(model, seed)
        file = save_lora(pipe.unet, tmp_path_factory.mktemp(kind), {"t_n": 437}, encoders if text else None)
        found[kind] = pipe, file
    return found


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


def renamed(file, name):
    return {name(k): v for k, v in load_file(file).items()}


# Layout → which LoRA, and how its file is made from ours.
LAYOUTS = {
    "ours": ("everything", lambda file, config: None),
    "ours, DoRA": ("dora", lambda file, config: None),
    "ours, all parts": ("text", lambda file, config: None),
    "peft": ("attention", lambda file, config: (load_file(file), None)),
    "diffusers": ("attention", lambda file, config: (renamed(file, lora_down_up), None)),
    "diffusers, all parts": ("text", lambda file, config: (renamed(file, lora_down_up), None)),
    "attention processors": ("attention", lambda file, config: (renamed(file, processors), None)),
    "attention processors, all parts": ("text", lambda file, config: (renamed(file, processors), None)),
    "kohya": ("everything", lambda file, config: to_kohya(file, config=config)),
    "kohya, diffusers' blocks": ("everything", lambda file, config: to_kohya(file, "diffusers", config=config)),
    "kohya, DoRA": ("dora", lambda file, config: to_kohya(file, config=config)),
    "kohya, all parts": ("text", lambda file, config: to_kohya(file, config=config)),
}


@torch.no_grad()
def outputs(pipe):
    """Of both text encoders and the UNet, for the same inputs."""
    prompt, _, pooled, _ = pipe.encode_prompt(["red apple", "penguin"], do_classifier_free_guidance=False)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    return prompt, pooled, pipe.unet.eval()(noise, 300, prompt, added_cond_kwargs=added).sample


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_and_sampling_make_the_same_model_of_a_file(miniature, unet, trained, tmp_path, layout):
    kind, convert = LAYOUTS[layout]
    pipe, file = trained[kind]
    made = convert(file, dict(unet.config))
    if made is not None:
        file = tmp_path / "style.safetensors"
        save_file(made[0], file, metadata=made[1])
    want, before = outputs(pipe), outputs(load_pipeline(str(miniature)))
    training = load_pipeline(str(miniature))
    start_from(training.unet, file, (training.text_encoder, training.text_encoder_2) if kind == "text" else ())
    for place in (file, file.parent):
        for got in (outputs(training), outputs(load_pipeline(str(miniature), lora=place))):
            for one, wanted in zip(got, want, strict=True):
                torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)
    assert (want[2] - before[2]).abs().max() > 1e-2
    assert torch.equal(want[0], before[0]) == (kind != "text")
