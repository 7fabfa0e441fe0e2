"""Training tasks: one module each, with settings, model, loss and batches."""
