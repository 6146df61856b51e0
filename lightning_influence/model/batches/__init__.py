"""Batches of any form: whose rows are whose, and batches of some of the examples."""
