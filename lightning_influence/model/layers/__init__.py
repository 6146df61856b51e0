"""What is covered, in blocks of parameters: layers, their gradients, and what records them."""
