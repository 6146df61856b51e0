"""Results: what questions return, how it is ranked, shown, averaged, logged and stored."""
