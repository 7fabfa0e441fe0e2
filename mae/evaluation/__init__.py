"""Evaluation of a model, in which each sample counts exactly once."""
