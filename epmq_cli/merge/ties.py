"""TIES: trim, elect sign, disjoint merge (Yadav et al. 2023, https://arxiv.org/abs/2306.01708, section 3, algorithm 1).

Trimming is over the whole task vector, as in the paper; with `scope: tensor` it is tensor by tensor, as in mergekit.
Two passes over the models find the exact thresholds by counting float bits, with one tensor in memory at a time. A
third pass finds the majority of signs over the whole vector, which the paper's code elects for elements whose task
vectors cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import torch

from epmq_cli.errors import ConfigError
from epmq_cli.merge.method import ElementwiseRule, MergeData, Need, Piece, PieceReader
from epmq_cli.merge.parameters import LARGEST_WEIGHT, Choice, Parameters, PerExpert, PerTensor, Weight
from epmq_cli.merge.settings import Setting
from epmq_cli.merge.source import MergeSource
from epmq_cli.runtime.progress import track
from epmq_cli.runtime.threads import spread, threads

if TYPE_CHECKING:
    from torch import Tensor

Count = Callable[[int, np.ndarray, np.ndarray], None]
"""Adds the counts of a piece of the k-th vector to a table (65536,)."""

Vectors = Callable[[], list["Tensor"]]
"""Reads one piece of every vector, flat in float32."""

Passes = Callable[[], Iterable[list[Vectors]]]
"""Starts a pass over the pieces of all vectors, tensor by tensor."""


def kth_largest_magnitudes(passes: Passes, densities: Sequence[float]) -> list[float]:
    """For each vector, the smallest of its int(density * N) largest magnitudes, at least one, where N is its length."""
    return magnitudes_of_rank(passes, len(densities), lambda k, length: max(1, int(densities[k] * length)))


def magnitudes_of_rank(passes: Passes, vectors: int, rank_of: Callable[[int, int], int]) -> list[float]:
    """For each vector, its `rank`-th largest magnitude, where `rank_of` gives the rank for its index and its length.

    `passes()` yields the same pieces of all vectors, tensor by tensor, each time it is called. Magnitudes are ordered
    like their bit patterns read as integers: the first pass counts the upper 16 bits, the second the lower 16 within
    the bin that holds the answer.
    """
    from epmq_cli.merge.kernels import count_lower, count_upper

    upper = _counted(passes(), vectors, lambda k, values, counts: count_upper(values, counts))
    length = int(upper[0].sum())
    bins = [_bin_from_top(counts, rank_of(k, length)) for k, counts in enumerate(upper)]
    lower = _counted(passes(), vectors, lambda k, values, counts: count_lower(values, bins[k][0], counts))
    bits = [high << 16 | _bin_from_top(counts, rest)[0] for counts, (high, rest) in zip(lower, bins, strict=True)]
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).tolist()


def _counted(tensors: Iterable[list[Vectors]], vectors: int, count: Count) -> Tensor:
    """(vectors, 65536): the counts of all pieces."""
    own = np.zeros((threads(), vectors, 1 << 16), np.int64)  # one table for each thread: two threads would lose counts

    def work(thread: int, pieces: list[Vectors]) -> None:
        for piece in pieces[thread :: len(own)]:
            for k, values in enumerate(piece()):
                count(k, values.numpy(), own[thread, k])

    for pieces in tensors:
        spread(partial(work, pieces=pieces), range(min(len(own), len(pieces))))
    return torch.from_numpy(own.sum(0))


def _bin_from_top(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the `rank`-th largest element, and its rank from the top within that bin."""
    from_top = counts.flip(0).cumsum(0)
    steps = int(torch.searchsorted(from_top, rank))
    above = int(from_top[steps - 1]) if steps else 0
    return len(counts) - 1 - steps, rank - above


@dataclass(frozen=True)
class Options:
    """Options of the merge of one piece: `thresholds` and `weights` of the task vectors; the `majority` sign, +1 or -1;
    the `scale`; whether the agreeing values are divided by their weights (`mean`)."""

    thresholds: Sequence[float]
    weights: Sequence[float]
    majority: float = 1.0
    scale: float = 1.0
    mean: bool = False


def elected(base: Tensor, experts: Sequence[Tensor], options: Options) -> Tensor:
    """Trims, elects and merges (n,) elements: base plus `scale` times the sum or the mean of the task vectors that
    agree with the elected sign, where values below a task vector's threshold count as 0. Each counts by its weight.

    The elected sign is the sign of the sum. Where the sum is zero and its terms are not, it is `majority`.
    """
    from epmq_cli.merge.kernels import elect

    merged, own = torch.empty_like(base), _arrays(options)
    last = (np.float32(options.majority), np.float32(options.scale), options.mean)
    elect(base.numpy(), torch.stack(list(experts)).numpy(), *own, *last, merged.numpy())
    return merged


def sign_sum(base: Tensor, experts: Sequence[Tensor], options: Options) -> int:
    """The sum of the signs of the sums of the trimmed task vectors."""
    from epmq_cli.merge.kernels import sum_signs

    signs = np.zeros(1, np.int64)
    sum_signs(base.numpy(), torch.stack(list(experts)).numpy(), *_arrays(options), signs)
    return int(signs[0])


def _arrays(options: Options) -> tuple[np.ndarray, np.ndarray]:
    return np.array(options.thresholds, np.float32), np.array(options.weights, np.float32)


def majority_sign(source: MergeSource, signs: Callable[[Piece], int]) -> float:
    """The sign, +1 or -1, of most elements of the sum of the trimmed task vectors. `signs`: the sum of the signs of a
    piece."""

    def read(reader: PieceReader) -> int:
        return signs(reader())

    names = track(source.names, "find the majority of signs")
    return 1.0 if sum(sum(spread(read, source.pieces(name))) for name in names) >= 0 else -1.0


@dataclass(frozen=True)
class Ties(Parameters):
    """`merge=ties`.

    `density`: the fraction of each task vector that is kept, in (0, 1], a setting; with `scope: global` the same for
    all tensors. `scale`: factor on the merged task vector. `combine`: the `sum` of the agreeing values (FusionBench,
    with scale 0.3) or their `mean` (the paper, with scale 1). `weights`: factors on the trimmed task vectors by task.
    `scope`: `global` trims the whole task vector, `tensor` each tensor for itself.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    density: Annotated[Setting, PerExpert(0, 1, open_low=True)]
    scale: Annotated[Setting, PerTensor(0, 10)]
    combine: Annotated[str, Choice(("sum", "mean"))]
    weights: Annotated[Setting, Weight(-LARGEST_WEIGHT)] = None
    scope: Annotated[str, Choice(("global", "tensor"))] = "global"

    def check(self, tasks: Sequence[str]) -> None:
        """ConfigError if a global density differs between tensors."""
        super().check(tasks)
        own = self.density.values() if isinstance(self.density, Mapping) else [self.density]
        if self.scope == "global" and not all(isinstance(density, (int, float)) for density in own):
            raise ConfigError(
                "merge.density differs between tensors, and merge.scope=global trims all tensors together; give one "
                "number, or one for each task, or choose merge.scope=tensor"
            )

    def fit(self, source: MergeSource, data: MergeData | None) -> ElementwiseRule:
        """Reads all models three times: twice for the thresholds, once for the majority of signs."""
        thresholds = self.thresholds(source)
        weights, scales = source.setting(self.weights, 1.0), source.setting(self.scale, 1.0)

        def options(piece: Piece) -> Options:
            return Options(thresholds[piece.name], [weights.at(piece.name, task) for task in piece.experts])

        majority = majority_sign(source, lambda piece: sign_sum(piece.base, [*piece.experts.values()], options(piece)))

        def merge(piece: Piece) -> Tensor:
            own = replace(options(piece), majority=majority, scale=scales.at(piece.name), mean=self.combine == "mean")
            return elected(piece.base, [*piece.experts.values()], own)

        return ElementwiseRule(merge)

    def thresholds(self, source: MergeSource) -> dict[str, list[float]]:
        """The smallest magnitude that is kept of each task vector, by tensor."""
        densities = source.setting(self.density, 1.0)

        def largest(names: Sequence[str], message: str = "") -> list[float]:
            def task_vectors() -> Iterator[list[Vectors]]:
                for name in track(names, message) if message else names:
                    yield [partial(_task_vectors, reader) for reader in source.pieces(name)]

            own = [densities.at(names[0], task) for task in source.tasks]
            return kth_largest_magnitudes(task_vectors, own)

        message = "find the TIES thresholds"
        if self.scope == "tensor":
            return {name: largest([name]) for name in track(source.names, message)}
        return dict.fromkeys(source.names, largest(source.names, message))


def trim_thresholds(source: MergeSource, density: float) -> list[float]:
    """For each task vector, the smallest magnitude of the part `density` of its elements that is kept."""

    def passes() -> Iterator[list[Vectors]]:
        for name in track(source.names, "find the thresholds"):
            yield [partial(_task_vectors, reader) for reader in source.pieces(name)]

    return kth_largest_magnitudes(passes, [density] * len(source.tasks))


def _task_vectors(reader: PieceReader) -> list[Tensor]:
    return [*reader().task_vectors().values()]
