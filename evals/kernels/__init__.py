"""Measures of the kernels: speed, scaling, and cache policies on recorded traces."""
