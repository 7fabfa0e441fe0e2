"""Checks before an expensive run: machine, data, batches, disk, and a few real steps; nothing is left behind."""
