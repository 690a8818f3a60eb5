"""Sample hospitals, local simulation, reports and benchmarks."""
