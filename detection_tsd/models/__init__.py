"""Backbones, heads and detectors."""
