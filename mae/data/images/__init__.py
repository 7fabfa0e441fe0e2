"""From the bytes of one image to its pixels and views."""
