"""Data sets of video person re-identification, their transforms and the draws of training sets."""
