"""What turns a model and batches into a finished run: optimiser, loop, checkpoints, run folder."""
