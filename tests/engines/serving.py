"""Servers of engines, started with the commands of the documentation."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch

import epmq_cli
from tests.helpers.pages import FENCE, ROOT, without_comment

SECONDS = 600
"""The longest time that a server takes to start."""


def documented(program: str) -> list[list[str]]:
    """The commands of docs/checkpoint.md that start with this program, in words."""
    text = (ROOT / "docs" / "checkpoint.md").read_text(encoding="utf-8")
    lines = [line for kind, _, block in FENCE.findall(text) if kind == "bash" for line in block.splitlines()]
    found = [shlex.split(without_comment(line)) for line in lines if re.match(rf"{program}\b", line)]
    assert found, f"no command {program}"
    return found


@contextmanager
def served(command: Sequence[str], log: Path) -> Iterator[str]:
    """Runs a server with the option --port, and yields its address when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
    with log.open("w") as output:
        server = subprocess.Popen([*command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT)
    try:
        while not _healthy(address):
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(1)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, ConnectionError, TimeoutError):
        return False


def asked(url: str, question: dict[str, Any]) -> dict[str, Any]:
    """The answer of a server to a question in JSON."""
    request = urllib.request.Request(url, json.dumps(question).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found


def check_greedy(checkpoint: Path, prompt: list[int], tokens: list[int], values: list[float], bound: float) -> None:
    """Tokens and their log-probabilities are the most likely ones of transformers after the same prefix, within the
    bound of an engine that rounds; the first token is the same."""
    model: Any = epmq_cli.load(checkpoint, device="cpu", kernel="dequantize")
    wanted = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert tokens[0] == int(wanted[0].argmax())
    own = wanted[range(len(tokens)), tokens]
    torch.testing.assert_close(torch.tensor(values), own, atol=bound, rtol=0)
    torch.testing.assert_close(own, wanted.max(-1).values, atol=2 * bound, rtol=0)
