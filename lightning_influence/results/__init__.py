"""Results: the parts of what a query returns, how they are ranked and how they are shown."""
