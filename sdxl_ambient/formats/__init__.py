"""LoRAs and UNets as files, in the layouts of diffusers, kohya and the original SDXL."""
