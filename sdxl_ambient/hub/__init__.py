"""Model cards and uploads (``python -m sdxl_ambient.hub``)."""
