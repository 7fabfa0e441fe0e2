"""Where shards lie: paths, URLs, remote stores and the cache of this machine."""
