"""How good a model is, each sample counted exactly once."""
