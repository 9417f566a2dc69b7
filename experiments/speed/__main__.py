"""``python -m experiments.speed CASE`` is ``python -m experiments speed CASE``."""

import sys

from ..cli import main

if __name__ == "__main__":
    sys.exit(main(["speed", *sys.argv[1:]]))
