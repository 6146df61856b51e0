"""The host: the user's Trainer, module, processes and random states, asked or borrowed and put back.

No other package reads or writes an underscored attribute of Lightning. Everything here is a context manager
that puts back what it found, or a question that changes nothing. ``tests/host/test_host.py`` names every
attribute, so that a new Lightning that moves one of them fails there first.
"""
