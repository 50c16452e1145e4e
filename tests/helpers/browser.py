"""Opens pages in a headless Chromium, with a script of the test at their end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=20000",
)
DARK = "--blink-settings=preferredColorScheme=0"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
AXE = Path(os.environ.get("EPMQ_AXE", "node_modules/axe-core/axe.min.js"))
"""axe-core, which `npm install axe-core` puts there."""
RESULT = "data-result"
WIDTHS = (500, 820, 1400)
"""Of windows in pixels; Chromium's are at least 500 wide."""

LOOK = """
const shown = [...document.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().width > 0);
return {
  requests: performance.getEntriesByType('resource').length,
  broken: window.broken === true,
  scripts: document.scripts.length,
  marks: shown.map(svg => svg.querySelectorAll('path, use').length),
  texts: shown.map(svg => svg.textContent).join(' '),
  named: shown.every(svg => svg.getAttribute('role') === 'img' && svg.querySelector('title').textContent),
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  smallest: Math.min(...shown.map(svg => Math.min(...[...svg.querySelectorAll('text')]
    .map(text => text.getBoundingClientRect().height)))),
  outside: shown.flatMap(svg => [...svg.querySelectorAll('text')].filter(text => {
    const own = text.getBoundingClientRect(), box = svg.getBoundingClientRect();
    return own.left < box.left - 2 || own.right > box.right + 2;
  }).map(text => text.textContent)),
};
"""


def needs_chromium() -> None:
    """Skips the test on machines without Chromium."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")


def needs_axe() -> str:
    """The text of axe-core; skips the test without it."""
    needs_chromium()
    if not AXE.is_file():
        pytest.skip(f"axe-core is not at {AXE}; npm install axe-core, or set EPMQ_AXE to axe.min.js")
    return AXE.read_text(encoding="utf-8")


def evaluated(page: str, script: str, folder: Path, width: int = 820, dark: bool = False) -> tuple[Any, str]:
    """What a script returns on a page, and the messages of the console. The script is the body of an async function;
    the page's security policy is widened for this script alone, and requests stay forbidden."""
    wide = page.replace("style-src 'unsafe-inline'", "style-src 'unsafe-inline'; script-src 'unsafe-inline'")
    assert wide != page
    tail = (
        f"<script>(async () => {{ {script} }})().then(value => "
        f"document.documentElement.setAttribute('{RESULT}', JSON.stringify(value)))</script></body>"
    )
    file = folder / "page.html"
    file.write_text(wide.replace("</body>", tail), encoding="utf-8")
    return _opened(file, folder, width, dark)


def seen(page: str, folder: Path, width: int) -> str:
    """The texts of the figures of a page in a window, a dark one if it is wide. Asserts that the page is whole: marks
    and names of figures, texts inside of them and readable, no script, no request, nothing said in the console."""
    needs_chromium()
    found, said = evaluated(page, LOOK, folder, width, dark=width == max(WIDTHS))
    assert said == ""
    assert (found["requests"], found["broken"], found["scripts"]) == (0, False, 1)  # the test's own script
    assert min(found["marks"], default=0) >= 2
    assert found["named"]
    assert found["overflow"] <= 0
    assert found["smallest"] >= 10
    assert found["outside"] == []
    return str(found["texts"])


def violations(page: str, folder: Path, dark: bool) -> list[Any]:
    """The rules of axe-core that a page breaks with all its tables open, each with an element."""
    axe = needs_axe()
    check = "document.querySelectorAll('details').forEach(part => part.open = true); "
    check += "const found = await axe.run(); return found.violations.map(v => [v.id, v.nodes[0].html]);"
    found, _ = evaluated(page.replace("</body>", f"<script>{axe}</script></body>"), check, folder, dark=dark)
    return list(found)


def _opened(file: Path, folder: Path, width: int, dark: bool) -> tuple[Any, str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, *([DARK] if dark else []), f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},2000", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    said = "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)
    _, found, rest = done.stdout.partition(f'{RESULT}="')
    assert found, said or done.stderr[-2000:]
    return json.loads(unescape(rest.partition('"')[0])), said
