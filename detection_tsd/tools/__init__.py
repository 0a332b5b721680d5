"""Conversions of published weights and data."""
