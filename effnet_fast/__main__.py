"""``python -m effnet_fast`` is the ``effnet-fast`` command."""

import sys

from effnet_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
