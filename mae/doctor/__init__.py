"""Checks before an expensive run: machine, data, batches, disk and a few real steps; no run folder is made."""
