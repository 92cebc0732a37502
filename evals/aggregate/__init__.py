"""Aggregators measured: which expert fuses best, and how fast answers are read and counted."""
