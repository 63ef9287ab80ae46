"""Benchmarks: ours and what a user would otherwise use, in one run.

``python -m fedtune.simulations.benchmarks.NAME [--quick]`` prints a table for
people and, as its last line, one JSON object.
"""
