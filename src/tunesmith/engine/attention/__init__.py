"""Attention along a prefix tree (`tree`), and where rows are not a tree (`backends`, `shifted`)."""
