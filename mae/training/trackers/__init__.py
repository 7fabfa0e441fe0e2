"""Trackers, such as TensorBoard: they are given what a run has logged, once a checkpoint covers it."""
