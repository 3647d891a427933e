"""Accuracies, measures of forgetting, and tables."""
