"""Runs a module of this repository or environment as `python -m` does, without the working directory, which may be
somebody's, in the search path: its place is taken by the repository of this file.

python launch/run_module.py dist_dcgan.train --data DIR
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
