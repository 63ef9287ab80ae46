"""Tests of ``fedtune.cli``."""
