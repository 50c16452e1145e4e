"""The tokenizer of a merge of models whose tokens differ (`suite.tokenizer`)."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epmq_cli.data.tokenizer_option import BASE, UNION, TokenizerOption
from epmq_cli.errors import ModelError
from epmq_cli.models.model_folder import ModelFolder
from epmq_cli.models.pretrained import config_of, from_folder
from epmq_cli.models.processor_files import OTHERS, TEMPLATES, TOKENIZER, ProcessorFiles, matches, own_files
from epmq_cli.models.processor_folder import processor_files

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
GENERATION = "generation_config.json"


class MergedTokenizer:
    """Builds the tokenizer and writes its files.

    `vocabulary`: token -> id of the result. `owned`: the same of each model, by task, the base's under None; a model
    without tokenizer files has the base's. Raises ModelError if a tokenizer cannot be read.
    """

    def __init__(self, base: ModelFolder, experts: Mapping[str, ModelFolder], option: TokenizerOption) -> None:
        self._base, self._option = base, option
        self._own = _loaded(base, base)
        if self._own is None:
            raise ModelError(f"base: {base.path} has no tokenizer for suite.tokenizer; add its files to the folder")
        self._models: dict[str | None, Any] = {None: self._own}
        for task, expert in experts.items():
            self._models[task] = _loaded(expert, base)
        self.owned: dict[str | None, dict[str, int]] = {
            task: (self._own if model is None else model).get_vocab() for task, model in self._models.items()
        }
        self._made = self._build()
        self.vocabulary: dict[str, int] = self._made.get_vocab()

    @property
    def size(self) -> int:
        """The rows of the result's tables."""
        rows, step = max(self.vocabulary.values()) + 1, self._option.pad_to_multiple_of or 1
        return -(-rows // step) * step

    def _build(self) -> Any:
        """A new tokenizer, so that the models' own stay as they are."""
        source = None if self._option.source in (BASE, UNION) else self._option.source
        made = copy.deepcopy(self._models[source] or self._own)
        if self._option.source == UNION:
            for tokenizer in self._models.values():
                if tokenizer is not None:
                    _add(made, tokenizer)
        known = made.get_vocab()
        made.add_tokens([each.token for each in self._option.tokens if each.token not in known])
        if self._option.chat_template is not None:
            made.chat_template = self._template(self._option.chat_template)
        return made

    def _template(self, template: str) -> Any:
        if template == "chatml":
            return CHATML
        if template != "auto":
            return template
        own = [getattr(model, "chat_template", None) for model in self._models.values()]
        counts = Counter(text.strip() for text in own if isinstance(text, str))
        return counts.most_common(1)[0][0] if counts else getattr(self._own, "chat_template", None)

    def moved(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The ids of special tokens in a config of the base that are other ids in the result."""
        names = {number: token for token, number in self.owned[None].items()}

        def new(value: Any) -> Any:
            if isinstance(value, list):
                return [new(item) for item in value]
            return self.vocabulary.get(names.get(value, ""), value) if isinstance(value, int) else value

        changes = {key: new(config[key]) for key in SPECIAL if config.get(key) is not None}
        return {key: value for key, value in changes.items() if value != config[key]}

    def copy(self, folder: Path) -> None:
        """Writes the tokenizer and the base's other files into a checkpoint folder."""
        ProcessorFiles(self._base.path).copy(folder)
        for name in list(own_files(folder)):
            if matches(name, (*TOKENIZER, *TEMPLATES)) or name in OTHERS[:2]:
                (folder / name).unlink()
        self._made.save_pretrained(folder)
        path = folder / GENERATION
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(content | self.moved(content), indent=2) + "\n", encoding="utf-8")


def _loaded(model: ModelFolder, base: ModelFolder) -> Any:
    """A model's own tokenizer; None if its folder has none."""
    from transformers import AutoTokenizer

    if not processor_files(model.path, "texts"):
        return None
    options = {} if (model.path / "config.json").is_file() else {"config": config_of(base.path)}
    return from_folder(AutoTokenizer, model.path, **options)


def _add(made: Any, tokenizer: Any) -> None:
    """Adds the tokens that a tokenizer lacks: first those of the other's vocabulary, then its added tokens."""
    known, added = made.get_vocab(), tokenizer.added_tokens_decoder
    contents = {token.content for token in added.values()}
    own = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    made.add_tokens([token for token, _ in own if token not in known and token not in contents])
    made.add_tokens([token for token in added.values() if token.content not in known])
