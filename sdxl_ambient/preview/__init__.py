"""What noisy latents show, level by level (``python -m sdxl_ambient.preview``)."""
