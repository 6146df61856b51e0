"""Running: loaders that visit every example once with its index, and the runners that pass over them."""
