"""LoRAs and UNets converted to what other programs read (``python -m sdxl_ambient.export``)."""
