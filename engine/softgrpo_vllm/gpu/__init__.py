"""Triton kernels of the plug-in."""
