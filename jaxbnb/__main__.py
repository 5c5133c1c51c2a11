"""``python -m jaxbnb``."""

import sys

from jaxbnb.cli import main

if __name__ == "__main__":
    sys.exit(main())
