"""The TAT network."""
