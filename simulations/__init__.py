"""A federation on one machine: engines, ready experiments, benchmarks."""
