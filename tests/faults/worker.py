"""`epmq` as torchrun starts it, with one process that does something to itself: worker.py RANK SIGNAL CALL ARGUMENTS.

Before the CALL-th sum over all processes for a norm (two for each task), process RANK sends itself SIGNAL.
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
