"""The `data` section: which shards, which objective, how samples become rows, and where remote shards are kept."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dist_transformer.config.base import Section

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
    """Share of the rows, relative to the other corpora's; null: its number of tokens."""
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
    """Where whole shards are kept on local disk; null: `dist_transformer/shards` in `$XDG_CACHE_HOME` or `~/.cache`."""
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
    `{0..3}` name several, read as one; its `train` split."""
    eval: str | None = None
    """Folder whose `eval` split is held out (its `train` split where it has no other); null: no evaluation."""
    mixture: tuple[CorpusConfig, ...] = ()
    """Several corpora or objectives in one run, instead of `train`: each row comes from one of them."""
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
        """What the rows are drawn from, every null filled in from this section: one, or the mixture's."""
        parts = self.mixture or (CorpusConfig(train=self.train or "", eval=self.eval),)
        inherited = ("objective", "noise_density", "mean_noise_span", "too_long")
        return tuple(
            part.model_copy(
                update={name: getattr(self, name) for name in inherited if getattr(part, name) is None}
            )
            for part in parts
        )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = []
        if self.mixture and self.train is not None:
            problems.append("train and mixture exclude each other: name every corpus in mixture")
        if not self.mixture and self.train is None:
            problems.append("train: required and not given (or give mixture)")
        if self.bucket_tokens is not None:
            if self.packing:
                problems.append(f"bucket_tokens={self.bucket_tokens} needs packing=false")
            longest = max(self.max_source_len, self.max_target_len)
            if self.bucket_tokens < longest:
                problems.append(
                    f"bucket_tokens={self.bucket_tokens} is less than one sample of {longest} tokens may need"
                )
        if not self.denoisers:
            problems.append("denoisers: give at least one")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def _denoisers_fit(self) -> Self:
        for denoiser in self.denoisers:
            if (denoiser.mode == "S") != (denoiser.mean_span is None):
                rule = "has no" if denoiser.mode == "S" else "needs a"
                raise ValueError(f"denoisers: one of mode {denoiser.mode} {rule} mean_span")
        return self
