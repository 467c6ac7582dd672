"""The `data` section: which shards, which objective, how samples become rows, and where remote shards are kept."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic_core import InitErrorDetails

from dist_transformer.config.base import Section, missing, refuse, unfit

ObjectiveName = Literal["span_corruption", "ul2", "prefix_lm", "pairs"]
TooLong = Literal["truncate", "drop", "error"]


class DenoiserConfig(Section):
    """One of UL2's denoisers (Tay et al. 2022, table 1)."""

    mode: Literal["R", "S", "X"]
    """Its mode token: R regular and X extreme span corruption, S sequential (prefix language modelling)."""
    mean_span: float | None = Field(default=None, ge=1)
    """Mean length of a removed span, in tokens; null for S, whose only span is the end of the document."""
    density: float = Field(gt=0, lt=1)
    """Share of tokens that are removed; for S its mean."""
    weight: PositiveFloat = 1.0
    """Share of the documents that it gets, relative to the others'."""


UL2_DENOISERS = (
    DenoiserConfig(mode="R", mean_span=3, density=0.15),
    DenoiserConfig(mode="R", mean_span=8, density=0.15),
    DenoiserConfig(mode="S", density=0.25),
    DenoiserConfig(mode="X", mean_span=3, density=0.5),
    DenoiserConfig(mode="X", mean_span=8, density=0.5),
    DenoiserConfig(mode="X", mean_span=64, density=0.15),
    DenoiserConfig(mode="X", mean_span=64, density=0.5),
)


class CorpusConfig(Section):
    """One part of a mixture. Fields that are null are those of `data`."""

    train: str
    """As `data.train`."""
    eval: str | None = None
    """As `data.eval`, for this corpus alone; it is measured by itself."""
    name: str | None = None
    """What metrics and messages call it; null: the folder's name."""
    weight: PositiveFloat | None = None
    """Share of the rows, relative to the other corpora's; null for all: their numbers of tokens."""
    objective: ObjectiveName | None = None
    """As `data.objective`."""
    noise_density: float | None = Field(default=None, gt=0, lt=1)
    """As `data.noise_density`."""
    mean_noise_span: float | None = Field(default=None, ge=1)
    """As `data.mean_noise_span`."""
    too_long: TooLong | None = None
    """As `data.too_long`."""


class RemoteConfig(Section):
    """Shards that are not on this machine: http(s), s3, gs and whatever else fsspec opens."""

    cache_dir: str | None = None
    """Where whole shards are kept on local disk; null: `$XDG_CACHE_HOME` (or `~/.cache`) `/dist_transformer/shards`."""
    cache_gib: PositiveFloat = 100.0
    """Size of that folder at which the shards that were not used for longest are removed."""
    attempts: PositiveInt = 5
    """Times that a shard is asked for before it counts as unreachable."""
    backoff_s: NonNegativeFloat = 1.0
    """Pause after the first failure, in seconds; doubled after each further one, up to a minute."""
    timeout_s: PositiveFloat = 60.0
    """Longest wait for an answer, or for the next bytes of one."""


class DataConfig(Section):
    """Shards to batches."""

    train: str | None = None
    """Folder of shards with a `manifest.json`, as `dist-transformer prepare` writes it: a path or a URL; `{a,b}` and
    `{0..3}` name several, read as one; its `train` split. Required unless `mixture` is given."""
    eval: str | None = None
    """Folder whose `eval` split is held out (its `train` split where it has no other); null: no evaluation."""
    mixture: tuple[CorpusConfig, ...] = ()
    """Several corpora or objectives in one run, instead of `train` and `eval`: each row comes from one of them."""
    mixing_temperature: float = Field(default=1.0, ge=1)
    """Rows are drawn in proportion to weight ** (1 / temperature) (T5, section 3.5.2): 1 as the weights say, larger
    evens them out."""
    objective: ObjectiveName = "span_corruption"
    """span_corruption: T5's denoising of plain text; ul2: UL2's mixture of denoisers; prefix_lm: continue a text;
    pairs: supervised source and target."""
    noise_density: float = Field(default=0.15, gt=0, lt=1)
    """Share of tokens that span corruption removes."""
    mean_noise_span: float = Field(default=3.0, ge=1)
    """Mean length of a removed span, in tokens."""
    denoisers: tuple[DenoiserConfig, ...] = UL2_DENOISERS
    """What `objective: ul2` mixes; the default is the paper's seven."""
    mode_tokens: bool = True
    """Begin each source of `ul2` with its denoiser's mode token."""
    max_source_len: PositiveInt = 512
    """Tokens in a row of the encoder."""
    max_target_len: PositiveInt = 114
    """Tokens in a row of the decoder; 114 is what span corruption makes of sources of 512."""
    subword_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which a training token falls apart into the two tokens that BPE merged it from, and those again
    (Provilkov et al. 2020; Sims et al. 2025), for corpora of little text: 0.1 is usual. Held-out text stays whole."""
    subword_dropout_target: float | None = Field(default=None, ge=0, lt=1)
    """The same for the targets of pairs; null: as `subword_dropout`. 0 lets a model write words in one spelling."""
    too_long: TooLong = "truncate"
    """What happens to a pair that is longer than a row; counted in any case. Plain text is always split."""
    packing: bool = True
    """Several samples in a row, kept apart by segment ids; false: each sample by itself, see `bucket_tokens`."""
    bucket_tokens: PositiveInt | None = None
    """With packing=false: samples of similar length form a batch of at most so many positions on either side, padded
    to its longest; it counts as one row of the global batch. null: one sample a row of full width."""
    window: PositiveInt = 4096
    """Samples that are shuffled and packed together, at most."""
    window_tokens: PositiveInt = 262144
    """Tokens in a window, at most: bounds a worker's memory and the time to its first row."""
    shuffle: bool = True
    """Permute shards and samples anew each epoch; false: the order in which they were written."""
    on_bad_shard: Literal["error", "skip"] = "error"
    """A damaged or unreachable shard stops the run; or is skipped from there on, counted and reported."""
    remote: RemoteConfig = RemoteConfig()
    """Shards that are not on this machine."""
    workers: NonNegativeInt = 1
    """Loader processes per rank; 0: in the training process."""
    prefetch: PositiveInt = 4
    """Micro-batches that each worker prepares ahead."""
    fingerprint: bool = False
    """Log `data/fingerprint`, a hash of each step's global batch that does not depend on the layout."""

    def corpora(self) -> tuple[CorpusConfig, ...]:
        """What the rows are drawn from, every null but `eval` and `weight` filled in: one, or the mixture's."""
        parts = self.mixture or (CorpusConfig(train=self.train or "", eval=self.eval),)
        return tuple(self._filled_in(part) for part in parts)

    def _filled_in(self, part: CorpusConfig) -> CorpusConfig:
        inherited = ("objective", "noise_density", "mean_noise_span", "too_long")
        update = {name: getattr(self, name) for name in inherited if getattr(part, name) is None}
        return part.model_copy(update={"name": part.name or folder_name(part.train)} | update)

    @model_validator(mode="after")
    def _corpora_fit(self) -> Self:
        problems = []
        if not self.mixture:
            if self.train is None:
                problems.append(missing("train"))
            if self.mixing_temperature != 1:
                problems.append(unfit("mixing_temperature", self.mixing_temperature, "needs a mixture"))
        else:
            for name, value in (("train", self.train), ("eval", self.eval)):
                if value is not None:
                    said = f"mixture is given too: name each corpus's own {name} there, and none here"
                    problems.append(unfit(name, value, said))
        problems += [
            problem for i, part in enumerate(self.mixture) for problem in self._part_problems(i, part)
        ]
        refuse("data", problems)
        return self

    def _part_problems(self, i: int, part: CorpusConfig) -> Iterator[InitErrorDetails]:
        names = [metric_name(earlier.name or "") for earlier in map(self._filled_in, self.mixture[:i])]
        name = self._filled_in(part).name or ""
        if metric_name(name) in names:
            said = (
                "an earlier corpus has this name: give each a name of its own (letters, digits and _ count)"
            )
            yield unfit(("mixture", i, "name"), name, said)
        if part.weight is None and any(other.weight is not None for other in self.mixture):
            yield unfit(
                ("mixture", i, "weight"), None, "other corpora have a weight: give one to all, or to none"
            )
        objective = part.objective or self.objective
        for field, wanted in _BELONGS_TO.items():
            if getattr(part, field) is not None and objective != wanted:
                said = f"has no effect on objective={objective}: leave it out"
                yield unfit(("mixture", i, field), getattr(part, field), said)

    @model_validator(mode="after")
    def _layout_fits(self) -> Self:
        problems = []
        if self.bucket_tokens is not None:
            if self.packing:
                problems.append(unfit("bucket_tokens", self.bucket_tokens, "needs packing=false"))
            longest = max(self.max_source_len, self.max_target_len)
            if self.bucket_tokens < longest:
                said = (
                    f"is less than the {longest} tokens that one sample may need: set it to {longest} or more"
                )
                problems.append(unfit("bucket_tokens", self.bucket_tokens, said))
        if self.subword_dropout_target is not None and all(c.objective != "pairs" for c in self.corpora()):
            said = "has no effect without objective=pairs: leave it out"
            problems.append(unfit("subword_dropout_target", self.subword_dropout_target, said))
        if not self.denoisers:
            problems.append(unfit("denoisers", [], "give at least one"))
        for i, denoiser in enumerate(self.denoisers):
            if (denoiser.mode == "S") != (denoiser.mean_span is None):
                said = (
                    "mode S has no mean_span" if denoiser.mode == "S" else f"mode {denoiser.mode} needs one"
                )
                problems.append(unfit(("denoisers", i, "mean_span"), denoiser.mean_span, said))
        refuse("data", problems)
        return self


_BELONGS_TO: dict[str, ObjectiveName] = {
    "noise_density": "span_corruption",
    "mean_noise_span": "span_corruption",
    "too_long": "pairs",
}
"""Fields of a corpus that only one objective reads."""


def folder_name(path: str) -> str:
    """What a folder of shards is called where nothing else is said: the last part of its path or URL."""
    return Path(os.path.normpath(Path.cwd() / path)).name or "shards"


def metric_name(name: str) -> str:
    """A corpus's or a held-out set's name in letters that every dashboard takes."""
    return re.sub(r"[^A-Za-z0-9_]", "_", name) or "held_out"
