"""Files of weights: a LoRA or a UNet, read from and written in the formats of diffusers, peft, kohya's scripts and SDXL."""

from sdxl_ambient.formats.adapter import Adapter, Weights
from sdxl_ambient.formats.attach import attach, start_from
from sdxl_ambient.formats.find import lora_file, part_files, unet_file, unet_files, unet_folder
from sdxl_ambient.formats.kohya import to_kohya
from sdxl_ambient.formats.load_lora import load_lora
from sdxl_ambient.formats.lora_export import export_lora
from sdxl_ambient.formats.original import original_model
from sdxl_ambient.formats.peft import load_lora_state, lora_state, peft_file, save_lora, save_unet
from sdxl_ambient.formats.read import from_kohya, read_adapter
from sdxl_ambient.formats.record import lora_metadata, model_metadata, read_training_info
from sdxl_ambient.formats.unet_export import export_unet

__all__ = [
    "Adapter",
    "Weights",
    "attach",
    "export_lora",
    "export_unet",
    "from_kohya",
    "load_lora",
    "load_lora_state",
    "lora_file",
    "lora_metadata",
    "lora_state",
    "model_metadata",
    "original_model",
    "part_files",
    "peft_file",
    "read_adapter",
    "read_training_info",
    "save_lora",
    "save_unet",
    "start_from",
    "to_kohya",
    "unet_file",
    "unet_files",
    "unet_folder",
]
