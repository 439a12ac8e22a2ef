"""Scores of what a model answered: text in, numbers out, no model."""
