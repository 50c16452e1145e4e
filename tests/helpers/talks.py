"""Language models with conversations as their data."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tests.helpers.minihub import decoder_hub


def talking(folder: Path, role: str = "assistant") -> Path:
    """A hub with conversations as its texts. `role`: who answers."""
    decoder_hub(folder, "llama")
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ eos_token }}{% endfor %}"
    (folder / "base" / "chat_template.jinja").write_text(template)
    for path in folder.glob("*.jsonl"):
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        talks = [[{"role": "user", "content": a}, {"role": role, "content": b}] for a, b in itertools.pairwise(texts)]
        path.write_text("".join(json.dumps({"text": talk}) + "\n" for talk in talks))
    return folder
