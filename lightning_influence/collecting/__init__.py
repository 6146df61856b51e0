"""Collecting: sums and figures taken during ``fit``, and when they are taken."""
