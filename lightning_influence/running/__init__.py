"""Running: loaders that visit every example once with its index, and passes over them."""
