"""Tests of ``fedtune.simulations``."""
