"""Runs the command line with every connection refused and recorded: offline.py, which needs no new interpreter here."""

from tests.promises import offline  # noqa: F401 - refuses them on import
from tunesmith.cli.main import main

if __name__ == "__main__":
    main()
