"""Oracles: the pages of all options with the real libraries, and what is imported for them."""

from __future__ import annotations

import json
import subprocess
import sys

from epmq_cli.commands.describe import page, posts_page
from epmq_cli.commands.stand_ins import SLOW, stand_ins
from epmq_cli.config.files import conf_dir, options

CODE = f"""
import contextlib, io, json, sys
from epmq_cli.commands.list import main
from epmq_cli.config.files import conf_dir, options

def printed(name):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        main([name])
    return text.getvalue()

names = [f"{{group}}={{option}}" for group, found in options([conf_dir()]).items() for option in found]
pages = {{name: printed(name) for name in ["merge.post", *names]}}
print(json.dumps({{"pages": pages, "slow": sorted({{*{SLOW!r}}} & set(sys.modules))}}))
"""


def test_the_page_of_every_option_needs_no_slow_library() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    groups = options([conf_dir()])
    pages = {
        f"{group}={option}": page(group, option, path) for group in groups for option, path in groups[group].items()
    }
    assert found == {
        "pages": {name: f"{text}\n" for name, text in {"merge.post": posts_page(""), **pages}.items()},
        "slow": [],
    }


def test_stand_ins_are_not_used_beside_the_libraries() -> None:
    import torch

    with stand_ins():
        import torch as inside
    assert inside is torch


def test_stand_ins_are_forgotten() -> None:
    code = """
import sys
from epmq_cli.commands.stand_ins import stand_ins
with stand_ins():
    import torch, torch.nn.functional
    from torch import Tensor, nn
    from epmq_cli.merge.ties import Ties

    class Layer(nn.Module):
        def __init__(self, size: int | Tensor) -> None:
            self.size = size

        @torch.no_grad()
        def double(self):
            return 2 * self.size

    assert Layer(3).double() == 6
    assert Ties.__module__ == "epmq_cli.merge.ties"
    assert isinstance(Layer, type) and not isinstance(3, Tensor)
assert not {"torch", "torch.nn", "torch.nn.functional"} & set(sys.modules)
assert not any(type(finder).__name__ == "_Finder" for finder in sys.meta_path)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
