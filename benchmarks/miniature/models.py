"""The miniature's networks and tokenizers: SDXL's classes and interfaces at about a thousandth of its size."""

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

RESOLUTION = 64
TIME_ID_WIDTH = 32
WIDTH_1, WIDTH_2 = 32, 48  # hidden sizes of the two text encoders; the UNet attends to their concatenation
VOCABULARY = 49408
MERGES = VOCABULARY - 2 * 256 - 2
Shape = dict[str, Any]  # keywords whose tuples may have any length; diffusers annotates them as of length one


def byte_symbols():
    """CLIP's 256 byte symbols in vocabulary order: the printable bytes as themselves, then the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def build_tokenizers(bpe_merges):
    """SDXL's two CLIP tokenizers from OpenAI's bpe_simple_vocab_16e6.txt.gz; they differ in the padding token only."""
    with gzip.open(bpe_merges, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    symbols = byte_symbols()
    entries = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    assert len(vocabulary) == VOCABULARY
    shared = {"vocab": vocabulary, "merges": merges, "model_max_length": 77}
    return CLIPTokenizer(pad_token="<|endoftext|>", **shared), CLIPTokenizer(pad_token="!", **shared)


def build_vae():
    """Autoencoder of 0.7 M parameters: pictures (n, 3, 64, 64) in [-1, 1] to latents (n, 4, 16, 16)."""
    shape: Shape = dict(
        block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=RESOLUTION, layers_per_block=1, norm_num_groups=8,
        force_upcast=False, **shape,
    )  # fmt: skip


def build_text_encoders():
    """Two small CLIP text models; the second one's projection gives the pooled embedding."""
    first = _text_config(WIDTH_1, heads=2, activation="quick_gelu", padding=VOCABULARY - 1)
    second = _text_config(WIDTH_2, heads=3, activation="gelu", padding=0)
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def input_embeddings(encoder) -> torch.nn.Embedding:
    """The embeddings of a text encoder's tokens."""
    embeddings = encoder.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)
    return embeddings


def _text_config(width: int, heads: int, activation: str, padding: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        projection_dim=width,
        hidden_act=activation,
        pad_token_id=padding,
        vocab_size=VOCABULARY,
        max_position_embeddings=77,
        num_hidden_layers=2,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
    )


def build_unet(dropout=0.0):
    """UNet of 2.8 M parameters with SDXL's interface: text_time conditioning, attention in the two lower stages."""
    heads: Shape = dict(attention_head_dim=(2, 4, 6))
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 4, in_channels=4, out_channels=4, block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, transformer_layers_per_block=1, norm_num_groups=16, **heads,
        use_linear_projection=True, dropout=dropout, cross_attention_dim=WIDTH_1 + WIDTH_2, addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH, projection_class_embeddings_input_dim=6 * TIME_ID_WIDTH + WIDTH_2,
    )  # fmt: skip


def build_denoiser(seed, dropout=0.0):
    """ModuleDict of everything that the denoising loss trains: unet (with dropout), text_encoder, text_encoder_2."""
    torch.manual_seed(seed)
    first, second = build_text_encoders()
    for encoder in (first, second):
        # The default, 0.02, leaves words nearly indistinguishable at the start, and those never trained for ever.
        torch.nn.init.normal_(input_embeddings(encoder).weight, std=0.3)
    return torch.nn.ModuleDict({"unet": build_unet(dropout), "text_encoder": first, "text_encoder_2": second})


def load_denoiser(denoiser, pipeline):
    """Give a ModuleDict of build_denoiser the weights of a pipeline folder, in the ModuleDict's own precision."""
    for name, module in denoiser.items():
        weights = {}
        for path in Path(pipeline, name).glob("*.safetensors"):
            weights |= load_file(path)
        module.load_state_dict(weights)


def build_scheduler():
    """The scheduler configuration that stable-diffusion-xl-base-1.0 ships."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        prediction_type="epsilon", interpolation_type="linear", use_karras_sigmas=False, timestep_spacing="leading",
        timestep_type="discrete", steps_offset=1,
    )  # fmt: skip


def token_ids(tokenizers, captions):
    """Two int64 tensors (n, 77): the captions as each tokenizer pads them."""
    options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    return tuple(tokenizer(captions, **options).input_ids for tokenizer in tokenizers)


def encode_prompts(text_encoders, ids):
    """What StableDiffusionXLPipeline.encode_prompt computes: states (n, 77, 80) and pooled embeddings (n, 48)."""
    outputs = [encoder(i, output_hidden_states=True) for encoder, i in zip(text_encoders, ids, strict=False)]
    return torch.cat([o.hidden_states[-2] for o in outputs], dim=-1), outputs[1].text_embeds


def save_pipeline(folder, vae, denoiser, tokenizers):
    """Write the diffusers-format pipeline, weights in half precision; the modules given are cast in place."""
    pipeline = StableDiffusionXLPipeline(
        vae=vae, **denoiser, tokenizer=tokenizers[0], tokenizer_2=tokenizers[1],
        scheduler=build_scheduler(),  # pyright: ignore[reportArgumentType] - diffusers annotates an enum of schedulers
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    for name in ("text_encoder", "text_encoder_2"):
        # Without torch_dtype, diffusers loads float32 and transformers what this entry says: they must agree.
        path = Path(folder, name, "config.json")
        config = json.loads(path.read_text()) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in Path(folder).rglob("*.safetensors"):
        path.chmod(0o644)
    for name in ("tokenizer", "tokenizer_2"):  # 3.6 MB each when indented
        path = Path(folder, name, "tokenizer.json")
        compact = json.dumps(json.loads(path.read_text(encoding="utf-8")), ensure_ascii=False, separators=(",", ":"))
        path.write_text(compact, encoding="utf-8")


def folder_bytes(folder):
    """Total size of the files under a folder."""
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
