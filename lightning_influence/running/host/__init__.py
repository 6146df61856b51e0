"""The host: the user's Trainer, module, processes and checkpoints, asked or borrowed and put back."""
