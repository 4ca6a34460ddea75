"""softgrpo-train in a process that sees simulated GPUs, as torchrun starts several of them:

    torchrun --nproc-per-node 2 tests/simulated_gpu/train.py --config ...

In float32, which no flash attention computes, so that its numbers are those of the CPU.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from simulated_gpu import found


def main() -> int:
    assert found.SIMULATED is not None, found.WHY_NOT
    import torch

    from simulated_gpu import collectives, flash
    from softgrpo.cli import train
    from softgrpo_engine.training import group_attention

    flash.Rules.any_dtype = True
    group_attention.FLASH_DTYPES = (*group_attention.FLASH_DTYPES, torch.float32)
    count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with found.SIMULATED.visible(count) as device, collectives.patched(device):
        return train.main()


if __name__ == "__main__":
    sys.exit(main())
