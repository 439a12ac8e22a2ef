"""Scores of generated answers: text in, numbers out, no model."""
