"""The engine's core: rows laid out as a prefix tree, each distinct token computed once, logits for labelled tokens alone.

`tree` lays rows out, `attention` attends along the tree, `batch` makes tensors of rows (as a tree, or padded), `loss`
takes the loss. All four keep the semantics of one row at a time.
"""
