"""`tunesmith` and `python -m tunesmith`."""

from tunesmith.safepath import leave_hub_kernels, leave_working_folder


def main() -> None:
    """Run the command line and leave with its exit code."""
    leave_working_folder()  # before anything else is imported
    leave_hub_kernels()
    from tunesmith.cli.main import main as command_line

    command_line()


if __name__ == "__main__":
    main()
