"""Oracles: the pages as the same functions make them beside torch, and what is imported for them."""

from __future__ import annotations

import json
import subprocess
import sys

from epmq_cli.commands.describe import page, posts_page
from epmq_cli.config.files import conf_dir, options

CODE = """
import contextlib, io, json
from epmq_cli.commands.list import main
from epmq_cli.config.files import conf_dir, options
from epmq_cli.runtime.imports import is_loaded

def printed(name):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        main([name])
    return text.getvalue()

names = [f"{group}={option}" for group, found in options([conf_dir()]).items() for option in found]
pages = {name: printed(name) for name in ["merge.post", *names]}
print(json.dumps([pages, is_loaded("torch"), is_loaded("transformers")]))
"""


def test_the_page_of_every_option_needs_no_slow_library() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    pages = {
        f"{group}={option}": page(group, option, path)
        for group, found in options([conf_dir()]).items()
        for option, path in found.items()
    }
    wanted = {name: f"{text}\n" for name, text in {"merge.post": posts_page(""), **pages}.items()}
    assert json.loads(done.stdout) == [wanted, False, False]
