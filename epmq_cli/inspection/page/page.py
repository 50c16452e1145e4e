"""The page of `epmq inspect --html`, made from the content that it prints as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from epmq_cli.inspection import sentences
from epmq_cli.inspection.page import experts, models
from epmq_cli.inspection.page.section import TEMPLATE, TEMPLATES, Section
from epmq_cli.report.page.assembly import assembled
from epmq_cli.report.table import counted
from epmq_cli.runtime.console import plain


def inspect_page(content: Mapping[str, Any]) -> str:
    """One self-contained HTML file about all paths, or about experts and their base."""
    paths = content["models"]
    if "experts" in content:
        return _page(*_experts_head(content["experts"]), expert_sections(content["experts"]))
    if len(paths) == 1:
        return _page(paths[0]["path"], _sentence(sentences.summary(paths[0])), model_sections(paths[0]))
    return _page(counted(len(paths), "model"), "What each of them holds.", _several(paths))


def _page(title: str, sentence: str, sections: Iterator[Section]) -> str:
    whole = (replace(section, sentences=[_sentence(text) for text in section.sentences]) for section in sections)
    filled = ((TEMPLATE, {"section": section}) for section in whole)
    return assembled(plain(title), plain(sentence), filled, TEMPLATES)


def _experts_head(content: Mapping[str, Any]) -> tuple[str, str]:
    """The title, and what a run would do with the experts."""
    reasons = content["refused"]
    said = [sentences.treatment(content)] if "parts" in content else []
    said.append(f"it would refuse {counted(len(reasons), 'thing')}" if reasons else sentences.ALLOWED)
    return sentences.experts(content), _sentence(f"family {content['family']}: {'; '.join(said)}")


def _sentence(text: str) -> str:
    """A text with a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def model_sections(content: Mapping[str, Any], number: int = 0) -> Iterator[Section]:
    """The sections about one path. `number`: of the path in the page."""
    sections = (
        models.refused(content),
        models.adapter(content),
        models.parts(content),
        models.checkpoint(content),
        models.bits(content, f"bits{number or ''}"),
        models.types(content),
        models.values(content),
    )
    yield from (section for section in sections if section is not None)


def _several(paths: list[Mapping[str, Any]]) -> Iterator[Section]:
    """Each path with its sections."""
    for number, content in enumerate(paths, 1):
        yield Section(content["path"], [_sentence(sentences.summary(content))])
        yield from (section.of(f"{number}. {plain(content['path'])}") for section in model_sections(content, number))


def expert_sections(content: Mapping[str, Any]) -> Iterator[Section]:
    """The sections about experts and their base."""
    sections = (
        models.refused(content),
        experts.vectors(content),
        *experts.maps(content),
        experts.models(content),
        models.parts(content),
    )
    yield from (section for section in sections if section is not None)
