"""Borders with the disk: atomic commits (`atomic`), rows with their place (`rows`), foreign folders (`safe`)."""
