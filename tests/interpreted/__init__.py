"""Tests of the Triton kernels in Triton's interpreter, on CPU tensors (see tests/test_kernels_interpreted.py)."""
