"""Collecting: the callback, what it sums up during ``fit``, when it does, and what it keeps."""
