"""Benchmarks: `python -m simulations.bench.NAME` prints a table and one JSON line."""
