"""The model card of a checkpoint."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from string import Template

from epmq_cli import __version__
from epmq_cli.checkpoint.exporter import Exporter
from epmq_cli.data.suite import Suite
from epmq_cli.quantize.formats.format import NumberFormat

SPECIAL = re.compile(r"[\\`*\[\]#~]|(?<![^\W_])_|_(?![^\W_])")  # inside words an underscore means nothing
CARD = Template("""---
library_name: transformers
tags: [$tags]
---

# $name: one model of $count experts

Made by epmq $version: merged with $merge, calibrated with $guidance, quantized with $quantizer.

- base: $base
- experts: $experts
- weights of the transformer blocks' linears: $weights

```python
from transformers import $architecture$requires

model = $architecture.from_pretrained("path/of/this/folder")
```

The heads of the tasks (class embeddings or classifiers), if they have any, are in `heads/heads.safetensors`, as
`<task>.weight`, `<task>.bias` and so on.
$processors`epmq eval path/of/this/folder` scores the model on every task; \
`epmq.json` holds the settings of the run.
""")


def model_card(
    suite: Suite,
    choices: Sequence[str],
    formats: Sequence[NumberFormat],
    bits: float | None,
    exporter: Exporter,
    architecture: str,
    processors: Mapping[str, str] | None = None,
) -> str:
    """The text of README.md.

    `choices`: the names of merge, guidance and quantizer. `formats`: the number formats that a linear can have. `bits`:
    the average width, None if nothing is quantized. `architecture`: the model's class in transformers. `processors`:
    the folder, in the checkpoint, of each tokenizer or image processor that belongs to one task.
    """
    merge, guidance, quantizer = choices
    return CARD.substitute(
        name=_plain(suite.name),
        count=len(suite.members),
        architecture=architecture,
        version=__version__,
        merge=_code(merge),
        guidance=_code(guidance),
        quantizer=_code(quantizer),
        base=_code(suite.base),
        experts=_experts(suite),
        weights=_weights(formats, bits) + (", stored dequantized" if formats and not exporter.packs else ""),
        tags=", ".join(["merge", "epmq", *exporter.tags]),
        requires=f"  # needs: pip install {' '.join(exporter.requires)}" if exporter.requires else "",
        processors=_processors(processors or {}),
    )


def _processors(places: Mapping[str, str]) -> str:
    """The paragraph about tasks that use their expert's own tokenizer or image processor."""
    if not places:
        return ""
    lines = "\n".join(f"- {_plain(task)}: {_code(place)}" for task, place in places.items())
    return (
        "\nThe tokenizer or image processor beside the model is the base's. These tasks need their expert's own, which "
        f"makes other inputs; load it from its folder:\n\n{lines}\n"
    )


def _experts(suite: Suite) -> str:
    return ", ".join(f"{_code(task.expert)} ({_plain(task.name)})" for task in suite.members)


def _plain(text: str) -> str:
    """Markdown that shows the text on one line. HTML and Markdown in it are escaped."""
    return SPECIAL.sub(r"\\\g<0>", html.escape(" ".join(text.split())))


def _code(text: str) -> str:
    """Markdown that shows the text as code. The fence is longer than any run of backticks in the text."""
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def _weights(formats: Sequence[NumberFormat], bits: float | None) -> str:
    """How the weights of the blocks' linears are stored."""
    if not formats or bits is None:
        return "dense"
    shared = formats[0]
    symmetric = "symmetric" if shared.zero_points == "none" else "asymmetric"
    groups = "one scale a row" if shared.group_size == -1 else f"groups of {shared.group_size}"
    return f"{bits:.4g} bits{_named(formats, bits)}, {symmetric}, {groups}"


def _named(formats: Sequence[NumberFormat], bits: float) -> str:
    """The formats in brackets. Integer formats are named by their bits, and omitted if all weights have the same."""
    integers = all(format.name == f"int{format.bits}" for format in formats)
    names = " and ".join(str(format.bits) if integers else format.name for format in formats)
    if bits in [format.bits for format in formats]:
        return "" if integers else f" ({names})"
    return f" on average ({names})"
