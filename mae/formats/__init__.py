"""Formats of other libraries: the names of their tensors, and how their files are read."""
