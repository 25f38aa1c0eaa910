"""The parts of an SDXL model: loaded, made trainable, and called."""
