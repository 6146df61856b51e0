"""``python -m lightning_influence``, the same as the command ``lightning-influence``."""

import sys

from lightning_influence.api.command_line.main import main

if __name__ == "__main__":
    sys.exit(main())
