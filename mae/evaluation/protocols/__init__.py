"""Protocols: ways to judge frozen features by labelled samples. Each is one file with a function `judge`."""
