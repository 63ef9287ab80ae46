"""``python -m fedtune``: the same command as ``fedtune``."""

from fedtune.cli import main

if __name__ == "__main__":
    main()
