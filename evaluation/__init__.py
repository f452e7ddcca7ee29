"""Measuring a trained model: k-NN, confusion, trained classifiers."""
