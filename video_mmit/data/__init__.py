"""Data sets of video recognition: lists, readers, sampling, transforms and clips."""
