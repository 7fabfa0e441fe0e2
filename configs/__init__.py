"""The shipped settings files; each is complete and readable alone."""
