"""The command line: questions to a model that a LightningCLI configuration and a checkpoint describe."""
