"""Converts rows to conversations (`formats`), and conversations to token ids with a loss mask (`template`)."""
