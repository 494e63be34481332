"""``python -m edgejoule``."""

from edgejoule.cli import main

if __name__ == "__main__":
    main()
