"""Reads the markup of pages."""

from __future__ import annotations

from html.parser import HTMLParser


class Ids(HTMLParser):
    """The ids and references of a page, and the tags that would load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.used: set[str] = set()
        self.loading: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for key, value in attributes:
            self.ids += [value or ""] if key == "id" else []
            self.used |= set((value or "").split()) if key == "aria-labelledby" else set()
            self.used |= {value[1:]} if key.endswith("href") and value and value.startswith("#") else set()
        if tag in ("script", "link", "img", "iframe", "object"):
            self.loading.append(tag)
