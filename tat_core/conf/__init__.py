"""Presets of a run, composed by Hydra."""
