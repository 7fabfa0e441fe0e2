"""The folder of a run: its settings, its log, its lock."""
