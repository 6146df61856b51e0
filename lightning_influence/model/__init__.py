"""The user's model: its layers and losses, the captured forward pass, and per-example gradients."""
