"""Measured arrays → figures, verdict, plots, page."""
