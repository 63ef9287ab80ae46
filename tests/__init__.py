"""Tests: one file per module, in the same tree as the package."""
