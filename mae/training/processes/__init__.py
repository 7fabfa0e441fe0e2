"""Processes of a run: they start, agree, stop and fail together."""
