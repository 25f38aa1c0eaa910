"""The parts of an SDXL model: loaded, made trainable, and called."""

from sdxl_ambient.models.base import check_sdxl, load_schedule, unet_config
from sdxl_ambient.models.conditioning import encode_prompts, encode_tokens, is_truncated, time_ids, tokenize
from sdxl_ambient.models.denoiser import Conditioning, Denoiser
from sdxl_ambient.models.load import Encoders, load_encoders, load_unet, load_unet_file
from sdxl_ambient.models.lora import LORA_TARGETS, add_lora, add_text_lora, lora_targets
from sdxl_ambient.models.quantization import quantize, quantized_bytes, quantized_layers
from sdxl_ambient.models.vae import check_geometry, check_resolution, decode_latents, encode_image, load_vae

__all__ = [
    "LORA_TARGETS",
    "Conditioning",
    "Denoiser",
    "Encoders",
    "add_lora",
    "add_text_lora",
    "check_geometry",
    "check_resolution",
    "check_sdxl",
    "decode_latents",
    "encode_image",
    "encode_prompts",
    "encode_tokens",
    "is_truncated",
    "load_encoders",
    "load_schedule",
    "load_unet",
    "load_unet_file",
    "load_vae",
    "lora_targets",
    "quantize",
    "quantized_bytes",
    "quantized_layers",
    "time_ids",
    "tokenize",
    "unet_config",
]
