"""Reads data sets of the Hugging Face hub, or of a mirror, with the `datasets` library (extra `hub`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from PIL import Image

from epmq_cli.data.columns import Columns, columns
from epmq_cli.data.folders import is_hidden, listed
from epmq_cli.data.labels import UNLABELLED, WITHOUT
from epmq_cli.data.pictures import Decoder, are_images, check_decoding
from epmq_cli.data.samples import Samples, Split
from epmq_cli.errors import ConfigError, DataError, first_line
from epmq_cli.runtime.paths import check_permitted, escapes, expanded

BUFFER = 2048  # rows in the shuffle buffer of a streamed draw
SHARDS = 32  # files, or row groups of parquet files, that fill the buffer in turn, so that sorted classes mix

log = logging.getLogger("epmq")

Values = Mapping[str, Sequence[Any]]
"""The values by column, images as {bytes, path}."""
Names = tuple[str, ...] | None


class Pictures(Sequence[Image.Image]):
    """Images that are decoded on access."""

    def __init__(self, stored: Sequence[Any], where: str, decoder: Decoder | None = None) -> None:
        """`stored`: each image as {bytes, path}, or its bytes alone."""
        self._stored, self._where, self._decoder = stored, where, decoder or Decoder()

    def __len__(self) -> int:
        return len(self._stored)

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]
        where, content = f"{self._where}: image {index}", self._content(index)
        if content is None:
            return self._decoder.convert(self._fetched(index), where)
        return self._decoder.decode(content, where)

    def raw(self, index: int) -> bytes | Image.Image:
        """The encoded image with the decoder's key; the decoded image if it is on the network."""
        content = self._content(index)
        return self[index] if content is None else self._decoder.key + content

    def _content(self, index: int) -> bytes | None:
        """The encoded image from the data set or from a local file; None if it is on the network."""
        stored = self._stored[index]
        if isinstance(stored, bytes):
            return stored
        if not isinstance(stored, Mapping) or (stored.get("bytes") is None and stored.get("path") is None):
            raise DataError(f"{self._where}: image {index} is missing (null); leave its row out")
        if stored.get("bytes") is not None:
            return bytes(stored["bytes"])
        path = Path(stored["path"])
        check_permitted(path, DataError)
        return path.read_bytes() if path.is_file() else None

    def _fetched(self, index: int) -> Image.Image:
        import datasets

        try:
            image: Image.Image = datasets.Image().decode_example(dict(self._stored[index]))
        except Exception as error:  # Pillow and the network raise unrelated errors
            raise DataError(f"{self._where}: image {index} cannot be read ({first_line(error)})") from error
        return image


@dataclass(frozen=True)
class Hub:
    """A data set by its id, or by the folder of a copy.

    `name`: its configuration, null if it has only one. `train` and `test`: its splits. `input`: the column of the
    image, text or conversation (as in `Documents`), or a list of two columns for pairs of texts; null for the usual
    columns of texts and conversations. `prompt`: a text with {column} placeholders, instead of `input`. `label`: the
    column of the label, which the train split need not have; null if there is none. `labels`: the values of that
    column, or the data set's names for them, in the order of the classes; null if the values are the whole numbers 0,
    1, ... `regression`: whether labels are numbers instead of classes. `answer`: the column of the text that answers
    are compared with, instead of `label`. `root`: a mirror, searched first, at `<root>/datasets/<id>` and
    `<root>/<id>`. `background` and `white_level` of images: see `Decoder`.
    """

    path: str
    name: str | None = None
    train: str = "train"
    test: str = "test"
    input: str | Sequence[str] | None = "image"
    label: str | None = "label"
    labels: Sequence[str | int | bool] | None = None
    prompt: str | None = None
    regression: bool = False
    answer: str | None = None
    root: str | None = None
    background: str | None = "white"
    white_level: float | None = None

    streams: ClassVar[bool] = True
    """Whether a draw of a few samples does not read the whole split."""

    def __post_init__(self) -> None:
        if self.name is not None and escapes(self.name):
            raise ConfigError(f"data.name must be a configuration of the data set, got {self.name!r}")
        check_decoding(self.background, self.white_level)
        _ = self.columns

    @property
    def columns(self) -> Columns:
        """The columns of a sample; ConfigError if they do not make one."""
        return columns("input", self.input, self.prompt, self.label, self.labels, self.regression, self.answer)

    def load(self, split: Split, count: int | None = None, seed: int | None = None) -> Samples:
        """Samples of the split, whose images are decoded on access.

        With a count, samples are streamed: nothing is kept on disk, and a draw reads about BUFFER rows from SHARDS
        places of the split. Without a count, or if the split cannot be streamed (offline, from the cache of
        `datasets`), the split alone is downloaded once into that cache.
        """
        library, stored = _datasets(self.path), self.train if split == "train" else self.test
        failures = (OSError, ValueError, NotImplementedError, library.exceptions.DatasetsError)
        if count is not None:
            try:
                samples = self._samples(*self._streamed(library, split, stored, count, seed), split)
                return _share(samples, count, seed) if split == "test" else samples
            except failures as error:
                level = logging.INFO if library.config.HF_HUB_OFFLINE else logging.WARNING
                log.log(
                    level, "data set %s cannot be streamed, so all of it is read (%s)", self.path, first_line(error)
                )
        try:
            values, names = self._whole(library, split, stored)
        except failures as error:
            mirror = f"; {self.root} has no copy of it either" if self.root and self.folder is None else ""
            raise DataError(
                f"data set {self.path} cannot be loaded; check its id, name and split ({first_line(error)}){mirror}"
            ) from error
        samples = self._samples(values, names, split)
        return _share(samples, count, seed) if split == "test" else samples.some(count, seed)

    @property
    def folder(self) -> Path | None:
        """The data set's local folder, in the mirror or at `path`; None if there is none."""
        mirrors = [Path(self.root) / "datasets", Path(self.root)] if self.root and not escapes(self.path) else []
        places = (expanded(place) for place in [*(mirror / self.path for mirror in mirrors), Path(self.path)])
        return next((place for place in places if place.is_dir()), None)

    def _builder(self, library: ModuleType, cache: Path | None = None) -> Any:
        """The data set's builder. A configuration that its README does not declare is a sub-folder of that name."""
        folder, name = self.folder, self.name
        place, options = str(folder or self.path), {"cache_dir": None if cache is None else str(cache)}
        if folder and name and (folder / name).is_dir() and name not in library.get_dataset_config_names(place):
            return library.load_dataset_builder(place, data_dir=name, **options)
        return library.load_dataset_builder(place, name, **options)

    def _streamed(
        self, library: ModuleType, split: Split, stored: str, count: int, seed: int | None
    ) -> tuple[Values, Names]:
        """`count` rows of the split, images undecoded, without writing to disk. Test splits with texts or local files
        are cheap to read: it returns BUFFER more rows of them, so that samples can be stratified by class."""
        builder = self._builder(library)
        rows = builder.as_streaming_dataset(split=stored)
        columns = self._columns(split, rows.column_names or list(next(iter(rows), {})))
        _check_folders(self.path, builder, rows)
        names, pictures = _names(rows, self.label), _has_pictures(library, rows, columns)
        rows = _undecoded(library, rows.select_columns(list(columns)))
        if seed is not None:
            rows = rows.reshard().shuffle(seed=seed, buffer_size=BUFFER, max_buffer_input_shards=SHARDS)
            count += BUFFER if split == "test" and (self.folder is not None or not pictures) else 0
        head = list(islice(rows, count))  # rows.take(count) would read one more batch
        return {name: [row[name] for row in head] for name in columns}, names

    def _whole(self, library: ModuleType, split: Split, stored: str) -> tuple[Values, Names]:
        """The split from the cache, where each split has its own folder, so that the others are not downloaded."""
        part = stored.partition("[")[0]
        try:
            builder = _only(self._builder(library, Path(library.config.HF_DATASETS_CACHE) / "epmq" / part), part)
        except OSError:  # offline: the whole data set, as other programs cache it
            builder = self._builder(library)
        builder.download_and_prepare(verification_mode="no_checks")
        rows = builder.as_dataset(split=stored)
        columns, names = self._columns(split, rows.column_names), _names(rows, self.label)
        _check_folders(self.path, builder, rows)
        rows = _undecoded(library, rows)
        return {name: rows[name] for name in columns}, names

    def _columns(self, split: Split, available: Sequence[str]) -> tuple[str, ...]:
        """The columns to read; DataError if the split lacks one. `available`: the columns of the split."""
        columns = self.columns.of(available, f"data set {self.path}")
        missing = [column for column in columns.required(split) if column not in available]
        if missing:
            hint = f"; {WITHOUT}" if missing[0] == columns.label else ""
            names = ", ".join(available)
            raise DataError(f"data set {self.path} has no column {missing[0]}; its columns are {names}{hint}")
        return columns.read(split, available)

    def _samples(self, values: Values, names: Names, split: Split) -> Samples:
        """The rows as samples; of the test split, only rows with a label."""
        columns, where = self.columns, f"data set {self.path}"
        labels, classes = columns.targets(values, where, split, names)
        samples = Samples(self._inputs(values), labels, classes, columns.references(values, where, split))
        return self._labelled(samples) if split == "test" and labels is not None and names is not None else samples

    def _labelled(self, samples: Samples) -> Samples:
        """The samples with a label; all samples if none has one, which scoring reports."""
        assert samples.labels is not None
        positions = (samples.labels != UNLABELLED).nonzero()[:, 0].tolist()
        if len(positions) in (0, len(samples)):
            return samples
        log.warning(
            "data set %s: %d of %d samples of the split %s have no label (-1) and are skipped",
            self.path,
            len(samples) - len(positions),
            len(samples),
            self.test,
        )
        return samples.take(positions)

    def _inputs(self, values: Values) -> Sequence[Any]:
        """The inputs of the rows: pictures or texts."""
        where = f"data set {self.path}"
        columns = self.columns.of(values, where)
        first = values[columns.inputs[0]]
        if self.prompt is None and are_images(first):
            return Pictures(first, self.path, Decoder(self.background, self.white_level))
        names = columns.inputs if columns.layout is None else tuple(values)
        rows = (dict(zip(names, row, strict=True)) for row in zip(*(values[name][:] for name in names), strict=True))
        return columns.texts(rows, where)


def _datasets(path: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data set {path} needs the datasets library; install it with pip install 'epmq-cli[hub]'"
        ) from error
    return datasets  # type: ignore[no-any-return, unused-ignore]


def _only(builder: Any, split: str) -> Any:
    """The builder without the files of other splits; ValueError if the split does not exist."""
    files = builder.config.data_files
    if files is not None and split.isidentifier():
        if split not in files:
            raise ValueError(f"its splits are {', '.join(map(str, files))}")
        if not _has_folders(builder):  # such a data set numbers its classes by the folders of all splits
            builder.config.data_files = type(files)({split: files[split]})
    return builder


def _has_folders(builder: Any) -> bool:
    """Whether the data set is a folder of files with classes as sub-folders."""
    return hasattr(builder, "BASE_COLUMN_NAME")


def _check_folders(path: str, builder: Any, rows: Any) -> None:
    """DataError if a class of such a data set is a folder that a system or tool created."""
    names = getattr((rows.features or {}).get("label"), "names", ()) if _has_folders(builder) else ()
    hidden = [name for name in names if is_hidden(name)]
    if hidden:
        raise DataError(
            f"data set {path} has folders that are not classes, {listed(hidden)}, which the datasets library counts as "
            "classes; remove them, or read the data set with epmq_cli.data.images.ImageFolder, which skips them"
        )


def _undecoded(library: ModuleType, rows: Any) -> Any:
    """The rows with {bytes, path} in place of images."""
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, library.Image):
            rows = rows.cast_column(name, library.Image(decode=False))
    return rows


def _names(rows: Any, label: str | None) -> Names:
    """The names of the values 0, 1, ... of the label's column, if the data set declares them."""
    names = getattr((rows.features or {}).get(label), "names", None)
    return None if names is None else tuple(map(str, names))


def _has_pictures(library: ModuleType, rows: Any, inputs: Sequence[str]) -> bool:
    """Whether an input is a picture, or may be one because the data set declares no types."""
    features = rows.features
    return features is None or any(isinstance(features.get(name), library.Image) for name in inputs)


def _share(samples: Samples, count: int | None, seed: int | None) -> Samples:
    """`count` samples: the first ones, or stratified by class and drawn by the seed."""
    return samples.some(count, None) if seed is None else samples.stratified(count, seed)
