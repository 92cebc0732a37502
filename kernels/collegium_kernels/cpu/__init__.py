"""Experts on the CPU."""
