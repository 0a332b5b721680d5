"""Data sets on disk, and the way of an image to the network."""
