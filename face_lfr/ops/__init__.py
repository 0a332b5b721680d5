"""Operators: a plain reference, a fast path, a dispatch by device."""
