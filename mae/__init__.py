"""Masked-autoencoder pretraining: image shards in, a ViT encoder out, fine-tuned and exported."""

__version__ = "0.1.0"
