"""`epmq` under torchrun, with one process that sends itself a signal: worker.py RANK SIGNAL CALL ARGUMENTS.

Process RANK sends itself SIGNAL before the CALL-th all-reduce for a norm (two for each task).
"""

from __future__ import annotations

import os
import sys

from epmq_cli import cli
from epmq_cli.calibrate.norms import NormObjective
from epmq_cli.runtime import distributed

rank, number, call = map(int, sys.argv[1:4])
if distributed.rank() == rank:
    from tests.faults.driver import on_call

    on_call(NormObjective, "close", (call + 1) // 2, lambda: os.kill(os.getpid(), number))()
sys.argv = ["epmq", *sys.argv[4:]]
cli.main()
