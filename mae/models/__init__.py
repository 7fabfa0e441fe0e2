"""The masked autoencoder and the classifier, with their patches, positions, masks, encoder and decoders."""
