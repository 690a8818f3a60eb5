"""Is training together better than alone? `python -m simulations.compare`."""
