"""From images to shards."""
