"""The processes of a run: how they start, agree, stop and fail together."""
