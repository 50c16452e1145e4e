"""`epmq` as torchrun starts it, with one process that does something to itself: worker.py RANK SIGNAL CALL ARGUMENTS.

At the so-manieth sum over all processes, process RANK sends itself SIGNAL.
"""

from __future__ import annotations

import os
import sys

import epmq_cli.calibrate.norms
from epmq_cli import cli
from epmq_cli.runtime import distributed

rank, number, call = map(int, sys.argv[1:4])
if distributed.rank() == rank:
    from tests.faults.driver import on_call

    on_call(epmq_cli.calibrate.norms, "all_reduce", call, lambda: os.kill(os.getpid(), number))()
sys.argv = ["epmq", *sys.argv[4:]]
cli.main()
