"""LoRAs of every kind, as if trained, and their files."""

import copy

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file

from sdxl_ambient.formats.kohya import to_kohya
from sdxl_ambient.formats.read import read_adapter
from sdxl_ambient.models.lora import LORA_TARGETS

LORA = "pytorch_lora_weights.safetensors"

INFO = {"t_n": 437, "low_noise": "skip", "base_model": "pipeline", "data": "0123abcd", "finetune": "lora", "step": 7}

PARTS = ("unet", "text_encoder", "text_encoder_2")


def randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
        elif "lora_" in name:
            p.data *= 1 + 0.2 * torch.rand(p.shape, generator=generator)


def adapted(unet, seed=0, **keywords):
    """A copy of the UNet with a LoRA whose every weight is as if trained."""
    tuned = copy.deepcopy(unet)
    keywords = {"r": 4, "lora_alpha": 6, "target_modules": [*LORA_TARGETS["all"], "conv_in", "linear_1"], **keywords}
    tuned.add_adapter(LoraConfig(**keywords))
    randomize(tuned, seed)
    return tuned.eval()


# Ranks and alphas that differ by kind of module, and for one module only.
PATTERNS = dict(
    rank_pattern={"conv1": 2, "to_k": 3},
    alpha_pattern={"to_q": 0.3, "conv2": 9, "mid_block.attentions.0.proj_in": 1.7},
)

KINDS = {
    "plain": dict(),
    "patterns": PATTERNS,
    "rslora": dict(use_rslora=True, lora_alpha=5, r=3),
    "dora": dict(use_dora=True, **PATTERNS),
}


@torch.no_grad()
def output(unet):
    generator = torch.Generator().manual_seed(9)
    noise, prompt = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 80, generator=generator)
    pooled = torch.randn(2, unet.config.projection_class_embeddings_input_dim - 6 * 32, generator=generator)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    return unet.eval()(noise, 300, prompt, added_cond_kwargs=added).sample


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def write(path, state, metadata=None):
    save_file(state, path, metadata=metadata)
    return path


def strengths(model):
    """Module → rank and the factor that peft applies."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            (adapter,) = layer.lora_A
            found[name] = layer.r[adapter], layer.scaling[adapter]
    return found


def peft_state(model, adapter):
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


@torch.no_grad()
def all_outputs(pipe):
    prompt, _, pooled, _ = pipe.encode_prompt(["red apple", "penguin"], do_classifier_free_guidance=False)
    return prompt, pooled, output(pipe.unet)


def metadata_of(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def as_kohya(lora, layout="sgm", *, config=None, **keywords):
    """The file of a LoRA, or a folder with one, in kohya's format: tensors and metadata."""
    return to_kohya(read_adapter(lora, config), layout, config=config, **keywords)
