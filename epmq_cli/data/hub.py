"""Tasks from data sets of the Hugging Face hub, through the `datasets` library (extra `hub`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from epmq_cli.data.samples import Samples, Split
from epmq_cli.data.table import label_indices
from epmq_cli.errors import DataError


@dataclass(frozen=True)
class Hub:
    """A data set by its id.

    `name`: its configuration, null for the only one. `train` and `test`: its splits. `input`: the column of the image
    or text, or a list of two columns for pairs of texts. `label`: the column of the label. `labels`: the values of
    that column in the order of the classes; null where they are the whole numbers 0, 1, ... themselves.
    """

    path: str
    name: str | None = None
    train: str = "train"
    test: str = "test"
    input: str | Sequence[str] = "image"
    label: str = "label"
    labels: Sequence[str | int] | None = None

    def load(self, split: Split) -> Samples:
        """All samples of the split, which is downloaded once into the cache of `datasets`."""
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                f"data set {self.path} needs the datasets library; install it with pip install 'epmq-cli[hub]'"
            ) from error
        columns = (self.input,) if isinstance(self.input, str) else tuple(self.input)
        try:
            rows = datasets.load_dataset(self.path, self.name, split=self.train if split == "train" else self.test)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"data set {self.path} cannot be had; check its id, name and split ({reason})") from error
        missing = [column for column in (*columns, self.label) if column not in rows.column_names]
        if missing:
            raise DataError(
                f"data set {self.path} has no column {missing[0]}; its columns are {', '.join(rows.column_names)}"
            )
        inputs = (
            rows[columns[0]] if len(columns) == 1 else list(zip(*(rows[column] for column in columns), strict=True))
        )
        return Samples(inputs, label_indices(list(rows[self.label]), self.labels, self.path))
