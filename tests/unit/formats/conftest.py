"""Shared by the tests of formats: LoRAs of each kind, and their files."""

import pytest
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from support.lora_files import INFO, KINDS, PARTS, adapted, peft_state, randomize

from sdxl_ambient.formats.peft import save_lora
from sdxl_ambient.pipeline import load_pipeline


@pytest.fixture(scope="module", autouse=True)
def on_one_thread(one_thread):
    """Such small layers take longer on two threads, which wait for each other."""


@pytest.fixture(scope="module")
def tuned(unet):
    return {kind: adapted(unet, seed, **keywords) for seed, (kind, keywords) in enumerate(KINDS.items())}


@pytest.fixture(scope="module")
def loras(tuned, tmp_path_factory):
    """Our own files of each kind. Not to be changed."""
    folder = tmp_path_factory.mktemp("loras")
    for kind, model in tuned.items():
        save_lora(model, folder / kind, INFO)
    return folder


@pytest.fixture(scope="module")
def config(unet):
    return dict(unet.config)


@pytest.fixture(scope="module")
def all_parts(miniature, tmp_path_factory):
    """A pipeline with peft's own LoRA of all three parts, and its file as diffusers saves it."""
    pipe, folder = load_pipeline(str(miniature)), tmp_path_factory.mktemp("all_parts")
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"]))
    for model in (pipe.text_encoder, pipe.text_encoder_2):
        targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
        patterns = dict(rank_pattern={"fc1": 2}, alpha_pattern={"q_proj": 9, "fc2": 1})
        model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets, **patterns))
    for seed, part in enumerate(PARTS):
        randomize(getattr(pipe, part), seed)
    layers, metadata = {}, {}
    for part in PARTS:
        model = getattr(pipe, part)
        name = "default" if part == "unet" else next(iter(model.peft_config))
        found = {k: sorted(v) if isinstance(v, set) else v for k, v in model.peft_config[name].to_dict().items()}
        state = peft_state(model, name)
        layers[f"{part}_lora_layers"], metadata[f"{part}_lora_adapter_metadata"] = state, found
    StableDiffusionXLPipeline.save_lora_weights(str(folder), **layers, **metadata)
    return pipe, folder
