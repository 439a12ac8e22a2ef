"""The closed form of a step's memory: a tape of what its operators save."""
