"""Influence of training data on the predictions of models trained with Lightning."""
