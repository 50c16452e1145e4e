"""Counters of the cases that the tests tried, for the last lines of pytest's report."""

from __future__ import annotations

from collections import Counter

TRIED: Counter[str] = Counter()
"""Of this process so far. For tests that pass, the counted cases had the expected result."""
KILLS, FAULTS = "processes killed", "other faults made in a process"
COMPARED = "results after kills compared byte for byte"
BAD, FUZZED, CLAIMS = "bad inputs and options", "fuzzed or damaged files", "examples of properties"
