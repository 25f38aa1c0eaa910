"""What a noise level protects, in closed form and against attacks (``python -m sdxl_ambient.privacy``)."""
