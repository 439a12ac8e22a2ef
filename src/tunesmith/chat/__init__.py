"""Rows to conversations (`formats`), conversations to token ids with a loss mask (`template`)."""
