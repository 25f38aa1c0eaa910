"""Noise against its controls: the whole study (``python -m benchmarks.study``)."""
