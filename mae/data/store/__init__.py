"""Shards and where to find them: paths, URLs, remote stores and the cache on this machine."""
