"""What can go wrong between this machine and a hub."""

from __future__ import annotations


def hub_errors() -> tuple[type[Exception], ...]:
    """The exceptions of huggingface_hub's calls: a refusal, an invalid name, nothing in the cache, no connection."""
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    return (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, ValueError, OSError)
