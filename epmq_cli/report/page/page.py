"""The page of a run, made from the content of its metrics.json alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from epmq_cli.report.page import blocks, config, layers, refinement, resources, scores, summary
from epmq_cli.report.page.assembly import assembled, filled
from epmq_cli.report.plain_counterpart import with_plain
from epmq_cli.report.run_folders import MULTIRUN, read
from epmq_cli.runtime.console import log, plain
from epmq_cli.store.atomic import write_text
from epmq_cli.store.run_lock import REPORT

Section = Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
"""From the content of metrics.json, the values of the section's template; None leaves the section out."""

SECTIONS: dict[str, Section] = {
    "scores": scores.section,
    "losses": layers.section,
    "bits": layers.bits_section,
    "refinement": refinement.section,
    "blocks": blocks.section,
    "resources": resources.section,
    "config": config.section,
    "reproduce": config.reproduce,
}
"""The sections of a run's page in their order, by template. A new section is a function, a template and an entry."""


def run_page(content: Mapping[str, Any]) -> str:
    """One self-contained HTML file; it needs neither scripts nor a network."""
    return assembled(plain(summary.title(content)), plain(summary.sentence(content)), filled(SECTIONS, content))


def write_report(folder: Path, content: Mapping[str, Any]) -> bool:
    """Writes report.html into a run folder; returns whether it could. If a finished job of the same sweep is the plain
    counterpart, its scores are shown too. A failure is a warning, because the results are complete without the page."""
    try:
        others = read([folder.parent]).runs if (folder.parent / MULTIRUN).is_file() else []
        write_text(folder / REPORT, run_page(with_plain(content, others)))
    except Exception as error:  # whatever a drawing library raises, the run is complete
        log.warning(
            "%s was not written (%s: %s); epmq report --pages makes it again", REPORT, type(error).__name__, error
        )
        log.debug("the reason", exc_info=True)
        return False
    return True
