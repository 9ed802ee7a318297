"""`python -m longreach` is the `longreach` command."""

import sys

from longreach.cli import main

if __name__ == "__main__":
    sys.exit(main())
