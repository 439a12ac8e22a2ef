"""The loss over labelled positions, and faster replacements for a model's modules: same results, less time and memory."""
