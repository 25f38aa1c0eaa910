"""Stores of noisy latents: planned, drawn once, read in batches."""
