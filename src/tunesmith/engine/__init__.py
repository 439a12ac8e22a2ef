"""The engine: rows packed into a prefix tree, each distinct token computed once, logits only for labelled tokens.

`packing` packs rows, `attention` attends along the tree, `modeling` has the loss and the modules it replaces in a model,
`optim` has the optimizer. All of them keep the semantics of one row at a time.
"""
