"""Attention along a prefix tree (`tree`), and for rows that are not packed into a tree (`backends`, `shifted`)."""
