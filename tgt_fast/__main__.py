"""``python -m tgt_fast``: the command line."""

import sys

from tgt_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
