"""Stages of `benchmarks/gpu.py`, and what they share.

This package imports only the standard library, except `worker.py` and what that process imports: the wheels must be
unpacked first.
"""
