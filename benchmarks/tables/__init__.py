"""Tables of docs/results.md: one file per table, with the commands that repeat its rows."""
