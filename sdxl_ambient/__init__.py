"""Fine-tune Stable Diffusion XL on noisy latents and measure what it memorised."""

import logging

__version__ = "0.1.0"

# Where bitsandbytes is installed, it says on some processors that an optional package of faster kernels is not.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
