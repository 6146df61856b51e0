"""The user's own training step, seen while a fit runs it."""
