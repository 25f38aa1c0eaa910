"""The ambient loop: samples restored at a lower level, as a store (``python -m sdxl_ambient.loop``)."""
