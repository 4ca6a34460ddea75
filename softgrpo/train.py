"""``torchrun --nproc-per-node N -m softgrpo.train ...``: softgrpo-train in several processes."""

import sys

from softgrpo.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
