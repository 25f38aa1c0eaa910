"""Membership attacks on a model."""
