"""From tar shards to uint8 batches: shards, index, order, decode, augment, loader, pack."""
