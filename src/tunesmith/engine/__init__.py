"""The engine: rows laid out as a prefix tree, each distinct token computed once, logits for labelled tokens alone.

`packing` lays rows out, `attention` attends along the tree, `modeling` has the loss and what it changes of a model's modules,
`optim` the optimizer. All of them keep the semantics of one row at a time.
"""
