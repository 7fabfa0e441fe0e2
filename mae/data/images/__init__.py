"""Decoding and augmentation of single images."""
