"""Training: a model and batches become a finished run, by optimiser, loop, checkpoints and run folder."""
