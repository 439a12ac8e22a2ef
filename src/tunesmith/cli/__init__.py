"""The command line: `main` is the entry point, `commands` parses, `render` and `plan` print."""
