"""``python -m lightning_light``: the command ``lightning-light``."""

import sys

from lightning_light.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
