"""Disk I/O: atomic commits (`atomic`), rows with their location (`rows`), untrusted model folders (`safe`)."""
