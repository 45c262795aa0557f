"""`python -m cmrhpc` is `cmrhpc`."""

import sys

from cmrhpc.cli import main

if __name__ == "__main__":
    sys.exit(main())
