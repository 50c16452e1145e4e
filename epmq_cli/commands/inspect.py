"""`epmq inspect PATH...`: what models, adapters and checkpoints hold, and what a run would do with them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from epmq_cli.commands.output_file import check_output, write_output
from epmq_cli.inspection.opened import open_headers

DESCRIPTION = """Shows what a model, a LoRA adapter or a checkpoint of epmq holds: parameters by part, types, sizes,
what a run would merge, quantize and leave, and what it would refuse. Reads only headers, unless --deep is given. With
--base, the paths are experts of that base, and are compared with it."""


def main(arguments: list[str]) -> None:
    """Prints tables, or JSON with --format json; writes a page with --html."""
    parser = argparse.ArgumentParser(prog="epmq inspect", description=DESCRIPTION)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a folder, a file, or a hub id")
    parser.add_argument("--base", help="the base of the experts")
    parser.add_argument("--family", default="auto", help="the family of the base, as suite.family (default: auto)")
    parser.add_argument("--vocabulary", default="same", help="same or pad, as suite.vocabulary (default: same)")
    parser.add_argument("--deep", action="store_true", help="read the tensors: norms, cosines, sign conflicts, NaN")
    parser.add_argument("--density", type=float, help="the merge.density of TIES for --deep (default: that of ties)")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="(default: table)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page; with --deep, it has heat maps")
    parser.add_argument("--data-root", help="a local mirror of the hub, searched first")
    parser.add_argument("--debug", action="store_true", help="print a traceback in place of a one-sentence error")
    chosen = parser.parse_args(arguments)
    check_output("--html", chosen.html)
    content = inspected(chosen)
    if chosen.html:
        from epmq_cli.inspection.page.page import inspect_page

        write_output(chosen.html, inspect_page(content))
    if chosen.format == "json":
        print(json.dumps(content, indent=2, allow_nan=False))
        return
    from epmq_cli.inspection import tables

    for model in content["models"]:
        tables.show(model)
    if "experts" in content:
        from epmq_cli.inspection.expert_tables import show_experts

        show_experts(content["experts"])


def inspected(chosen: argparse.Namespace) -> dict[str, Any]:
    """The content of all paths; with a base, also of the comparison with it."""
    from epmq_cli.inspection.content import content_of

    if chosen.base is not None:
        from epmq_cli.inspection.experts import experts_content

        sources = (chosen.base, chosen.paths, chosen.data_root)
        return {"models": [], "experts": experts_content(sources, chosen.family, chosen.vocabulary, _depth(chosen))}
    models = []
    for path in chosen.paths:
        opened = open_headers(path, "model", chosen.data_root)
        models.append(content_of(opened))
        if chosen.deep:
            from epmq_cli.inspection.deep import values_of

            models[-1]["values"] = values_of(opened)
    return {"models": models}


def _depth(chosen: argparse.Namespace) -> float | None:
    """The density for --deep; None without it."""
    if not chosen.deep:
        return None
    if chosen.density is not None:
        density: float = chosen.density
        return density
    from omegaconf import OmegaConf

    from epmq_cli.config.instantiate import conf_dir

    return float(OmegaConf.load(conf_dir() / "merge" / "ties.yaml").density)
