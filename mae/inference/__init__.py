"""Use of trained models: features, predictions, reconstructions, attention."""
