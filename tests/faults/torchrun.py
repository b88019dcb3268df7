"""torchrun, whose ranks are those of tests.faults.rank instead of dist_dcgan.train.

With FORKED_RANKS in the environment they are forked from it: it imports once what each of them would.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

from torch.distributed.run import main

from tests.support.forks import PRELOADED
from tests.support.torchrun import fork_ranks

if __name__ == "__main__":
    if "FORKED_RANKS" in os.environ:
        for name in PRELOADED:
            import_module(name)
        fork_ranks(sys.argv[1:])
    main(["tests.faults.rank" if word == "dist_dcgan.train" else word for word in sys.argv[1:]])
