"""Scores of segmentations against labels, all computed from one confusion matrix."""
