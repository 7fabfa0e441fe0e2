"""What can be learned: one module per task, with its settings, model, loss and batches."""
