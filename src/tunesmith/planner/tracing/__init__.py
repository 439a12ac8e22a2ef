"""The same step traced on fake tensors of the real modules; imports torch."""
