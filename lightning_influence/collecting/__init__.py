"""Collecting: the callback, and what it sums up during ``fit``."""
