"""Fine-tune Stable Diffusion XL on noisy latents and measure what it memorised."""

__version__ = "0.1.0"
