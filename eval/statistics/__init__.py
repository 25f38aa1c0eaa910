"""Thresholds, intervals and tests, from arrays alone."""
