"""Experts on CUDA in Triton. Importing this package does not import triton; its kernels.py does."""
