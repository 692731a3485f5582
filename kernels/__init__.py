"""Fused kernels, one file per op; import them as ``fastpref.kernels``."""
