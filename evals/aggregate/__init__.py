"""Combining answers, measured on recorded ones."""
