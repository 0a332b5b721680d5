"""Preparation of data and conversion of published checkpoints."""
