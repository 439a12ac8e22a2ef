"""Rows to the tensors of a forward pass: `tree` finds what they share, `batch` makes the tensors, `layout` tells attention."""
