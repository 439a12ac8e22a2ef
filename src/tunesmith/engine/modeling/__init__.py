"""The loss over labelled places, and modules of a model computed another way: same results, less time and memory."""
