"""Compute kernels of dist-reg: each file holds one operation, its plain torch reference and its fast paths.

Nothing here imports `dist_reg`, and importing this package imports neither Triton nor Numba.
"""
