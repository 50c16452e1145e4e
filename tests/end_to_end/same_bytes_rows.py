"""The rows of same_bytes.py: each is one `epmq run` or `epmq merge`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

SMALL = ("device=cpu", "cache=false", "group_size=16", "calib.samples=24", "calib.batch_size=8", "eval.stages=[]")
TINY = ("device=cpu", "cache=false", "calib.samples=32", "eval.stages=[]")
FAMILIES = ("clip", "open_clip", "bert", "roberta", "deberta", "distilbert", "vit", "t5", "causal_lm")
OTHERS = ("t5_tied", "t5_untied", "qwen3", "gemma3", "phi3", "lora")
"""Kinds of models other than those with a family's name."""
MERGES = {
    "average": ("merge=average",),
    "task_arithmetic": ("merge=task_arithmetic",),
    "ties": ("merge=ties",),
    "ties_mean": ("merge=ties", "merge.combine=mean", "merge.scale=1"),
}
QUICK = (
    "clip/feature/gptq",
    "open_clip/expert/gptq",
    "bert/merged/rtn",
    "bert/feature/gptq",
    "deberta/expert/gptq",
    "t5/feature/gptq",
    "causal_lm/feature/gptq",
    "lora/expert/rtn",
    "bert/options/bits=3.5",
    "bert/merge/ties",
    "causal_lm/merge/task_arithmetic",
    "bert/resumed",
    "bert/two processes",
)


def pinned(options: tuple[str, ...]) -> tuple[str, ...]:
    """The options, and the defaults of the time when the hashes were recorded."""
    others = any(option.startswith("quant=") and option != "quant=gptq" for option in options)
    own = () if others or "quant.act_order=true" in options else ("quant.act_order=false",)
    return ("guidance.safe=false", *options, *own)


@dataclass(frozen=True)
class Row:
    """`kind` of same_bytes_models, or empty for the built-in suite; `how` to run the command."""

    name: str
    kind: str
    options: tuple[str, ...]
    command: str = "run"
    how: str = "once"
    threads: int = 1

    @property
    def quick(self) -> bool:
        return self.name in QUICK

    @property
    def portable(self) -> bool:
        """Whether the weights are equal on every processor: merges are elementwise, and rounding to nearest depends
        on sums only through the choice among scales. Checked without AVX2 and FMA, in torch and in numba."""
        zero_shot = self.kind in ("clip", "open_clip")  # their heads come from a text tower
        return self.command == "merge" or (self.name.endswith("/merged/rtn") and not zero_shot)


OPTIONS: dict[str, tuple[str, ...]] = {
    "bits=2": ("bits=2",),
    "bits=3": ("bits=3",),
    "bits=3.5": ("bits=3.5",),
    "bits=8": ("bits=8",),
    "asymmetric grid": ("quant.symmetric=false",),
    "asymmetric grid rtn": ("quant.symmetric=false", "quant=rtn"),
    "group_size=-1": ("group_size=-1",),
    "grid=mse": ("quant.grid=mse",),
    "grid=minmax": ("quant.grid=minmax",),
    "rtn grid=minmax": ("quant=rtn", "quant.grid=minmax", "guidance=merged"),
    "act_order": ("quant.act_order=true",),
    "dense": ("quant=none",),
    "bfloat16": ("pack.dtype=bfloat16",),
    "shards": ("pack.shard_size=20KB",),
    "merge=ties": ("merge=ties",),
    "merge=average": ("merge=average",),
    "guidance=asymmetric": ("guidance=asymmetric", "merge=none"),
    "tuned": ("guidance.lam=auto", "guidance.alpha=auto", "guidance.beta=auto", "guidance.rho=auto"),
    "heads": ("guidance.heads=always",),
    "two passes": ("guidance.sweeps=2",),
    "tokens": ("guidance.task_weight=tokens", "guidance.weights={first: 2}"),
    "student=disk": ("calib.student=disk",),
    "little memory": ("calib.memory=1KB",),
    "scored": ("eval.stages=[base,experts,merged,quantized]",),
    "seed": ("seed=1",),
}
"""Each with guidance=feature and quant=gptq unless it sets them."""
TINY_OPTIONS = ("bits=2", "bits=3", "bits=3.5", "bits=8", "asymmetric grid", "group_size=-1", "dense", "bfloat16")


def _rows() -> Iterator[Row]:
    yield Row("tiny/defaults", "", ("device=cpu", "cache=false", "eval.stages=[]"), threads=2)
    yield Row("tiny/torchrun", "", (*TINY, "calib.batch_size=8", "bits=3.5"), how="torchrun")
    for family in FAMILIES:
        for guidance in ("merged", "expert", "feature"):
            for quant in ("rtn", "gptq"):
                options = (*SMALL, "bits=4", f"guidance={guidance}", f"quant={quant}")
                yield Row(f"{family}/{guidance}/{quant}", family, options)
    for kind in OTHERS:
        for guidance, quant in (("expert", "rtn"), ("feature", "gptq")):
            yield Row(f"{kind}/{guidance}/{quant}", kind, (*SMALL, f"guidance={guidance}", f"quant={quant}"))
    for name in TINY_OPTIONS:
        yield Row(f"tiny/options/{name}", "", (*TINY, *OPTIONS[name]))
    for kind in ("bert", "clip"):
        for name, options in OPTIONS.items():
            if kind == "bert" or name not in ("shards", "tokens", "seed"):
                yield Row(f"{kind}/options/{name}", kind, (*SMALL, *options))
    for kind in ("", *FAMILIES, *OTHERS):
        for name in MERGES if kind in ("", "bert", "clip") else ("task_arithmetic", "ties"):
            yield Row(f"{kind or 'tiny'}/merge/{name}", kind, MERGES[name], command="merge")
    yield Row("tiny/merge/two threads", "", MERGES["ties"], command="merge", threads=2)
    for kind in ("bert", "clip", "causal_lm"):
        yield Row(f"{kind}/resumed", kind, SMALL, how="resumed")
        yield Row(f"{kind}/two processes", kind, SMALL, how="two processes")
    yield Row("bert/cached", "bert", tuple(option for option in SMALL if option != "cache=false"), how="twice")


ROWS = tuple(row if row.command == "merge" else replace(row, options=pinned(row.options)) for row in _rows())
