"""Rows to the tensors of a forward pass: `tree` finds shared prefixes, `batch` makes tensors, `layout` describes the tree."""
