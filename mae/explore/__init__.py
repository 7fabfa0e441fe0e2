"""Page on which a run is looked at by hand: one's own picture and mask, attention, features, neighbours, classes."""
