"""Triton kernels of the private step, one operation a file; installed as `fastloda.kernels`. They need torch and triton alone."""
