"""Folder of a run: its settings, log and lock, and what may change when the run is resumed."""
