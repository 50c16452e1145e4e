"""docs/architectures.md. Oracles: the families, and the tiny models of the other tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from epmq_cli.errors import ModelError
from epmq_cli.families import FAMILIES, claiming
from tests.helpers.architecture_table import REFUSED_TYPES, TAKEN_TYPES, table
from tests.helpers.architectures import REFUSED, TAKEN

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


def test_the_page_has_the_table() -> None:
    assert table() in PAGE.read_text()


def test_the_table_has_every_type_that_a_family_takes() -> None:
    types = {kind for family in FAMILIES.values() for kind in family.model_types}
    assert types == {*TAKEN_TYPES}
    assert [*TAKEN_TYPES] == sorted(TAKEN_TYPES)
    assert [*REFUSED_TYPES] == sorted(REFUSED_TYPES)
    assert {name.partition("-")[0] for name in TAKEN} <= {kind.partition("-")[0] for kind in TAKEN_TYPES}
    assert {*REFUSED} <= {*REFUSED_TYPES}


@pytest.mark.parametrize("kind", REFUSED_TYPES)
def test_other_types_are_refused_in_one_sentence(kind: str) -> None:
    with pytest.raises(ModelError, match=f"no family takes models of type {kind}") as raised:
        claiming({"model_type": kind})
    assert "\n" not in str(raised.value)
