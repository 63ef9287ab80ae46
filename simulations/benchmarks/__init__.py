"""Benchmarks, each a module: ``python -m fedtune.simulations.benchmarks.NAME [--quick]``.

Each measures fedtune and what a user would otherwise use in the same run,
prints a table for people and, as its last line, one JSON object.
"""
