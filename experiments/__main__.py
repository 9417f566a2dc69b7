"""``python -m experiments``, and ``classp`` where the package is installed."""

from .errors import INSTALL, print_error


def main() -> int:
    """Run the command line, or say what it needs."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        print_error(f"{error}; {INSTALL} brings it")
        return 2
    return run()


if __name__ == "__main__":
    raise SystemExit(main())
