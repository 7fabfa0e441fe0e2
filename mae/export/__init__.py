"""Exports to other libraries: one module each; every export is loaded back by the library and compared."""
