"""Losses of which no function is known by name: cut at the outputs of modules, or read one by one."""
