"""One file per task, from top to bottom; started by `accelerate launch` or by `mae COMMAND`."""
