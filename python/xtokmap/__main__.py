"""`python -m xtokmap`."""

import sys

from xtokmap.cli import main

if __name__ == "__main__":
    sys.exit(main())
