"""The masked autoencoder and the classifier: patches, positions, masking, encoder, decoder."""
