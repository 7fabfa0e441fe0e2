"""Shipped settings files; each is complete by itself."""
