"""``python -m fastssl``: the same program as the console script ``fastssl``."""

import sys

from fastssl.cli import main

if __name__ == "__main__":
    sys.exit(main())
