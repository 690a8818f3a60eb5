"""TAT, its data, training and evaluation: everything a lone hospital can use. Never imports Flower."""
