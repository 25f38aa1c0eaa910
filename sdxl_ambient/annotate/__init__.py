"""Noise levels of untrusted pictures, found by comparison (``python -m sdxl_ambient.annotate``)."""
