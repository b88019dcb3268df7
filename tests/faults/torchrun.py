"""torchrun, whose ranks are those of tests.faults.rank instead of dist_dcgan.train."""

from __future__ import annotations

import sys

from torch.distributed.run import main

if __name__ == "__main__":
    main(["tests.faults.rank" if word == "dist_dcgan.train" else word for word in sys.argv[1:]])
