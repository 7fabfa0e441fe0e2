"""One file per target; every export is reloaded with the target library and compared."""
