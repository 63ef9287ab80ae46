"""Tests of reading, dividing and encoding data."""
