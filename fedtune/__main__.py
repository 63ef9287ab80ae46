"""``python -m fedtune``: the same command as ``fedtune``."""

import sys

from fedtune.cli import main

if __name__ == "__main__":
    sys.exit(main())
