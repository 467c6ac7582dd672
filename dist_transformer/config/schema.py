"""Every configuration section, with its defaults and what each field means.

Loading probes no hardware and imports no torch, so that a login node can check a job before it is submitted.
`docs/configuration.md` is written from the docstrings below.
"""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dist_transformer.config.base import Section
from dist_transformer.config.data import DataConfig
from dist_transformer.config.evaluate import EarlyStoppingConfig, EvaluateConfig, Mode
from dist_transformer.config.faults import FaultsConfig
from dist_transformer.config.generate import GenerateConfig
from dist_transformer.config.model import ModelConfig

OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.clip",
    "bf16": "train.precision",
    "fp16": "train.precision (bf16: encoder-decoders overflow in fp16)",
    "amp": "train.precision",
    "data_types": "train.grad_accum_dtype",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer.device": "parallel.offload",
    "zero_optimization.offload_param.device": "parallel.offload",
    "zero_optimization.compute_grad_norm": "train.max_bad_steps (the norm finds bad updates)",
    "prescale_gradients": "train.global_batch_size (the loss is divided once, by target tokens)",
    "gradient_predivide_factor": "train.global_batch_size (the loss is divided once, by target tokens)",
    "zero_allow_untested_optimizer": "optimizer.name",
    "wandb": "tracking.wandb (DeepSpeed's own logging would make W&B drop ours)",
    "tensorboard": "tracking.tensorboard",
}
"""Keys that may not stand under `deepspeed:`, and what sets them instead."""


class RunConfig(Section):
    """Where the run lives and what its randomness starts from."""

    dir: str
    """The run directory: configuration, metrics, checkpoints, tracking files."""
    seed: NonNegativeInt = 1
    """Seed of initial weights, data order, noise and dropout."""


class TrainConfig(Section):
    """What one step is, and how many there are."""

    steps: PositiveInt
    """Optimizer updates in the whole run."""
    global_batch_size: PositiveInt = 2048
    """Rows in one update, over all ranks: fixes what the model sees."""
    micro_batch_size: PositiveInt = 32
    """Rows that one rank handles at a time: fits memory, changes nothing else."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 master weights in the optimizer."""
    grad_accum_dtype: Literal["fp32", "same"] = "fp32"
    """Precision in which micro-steps' gradients add up; `same` as the parameters saves memory; ZeRO 0 has `same`."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Weight of the uniform distribution in the target (the paper, section 5.4)."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of log(Z)^2, which keeps the output's normaliser near 1 (T5 v1.1 uses 1e-4)."""
    r_drop: NonNegativeFloat = 0.0
    """Send each row through the model twice and draw both outputs together (R-Drop, Liang et al. 2021, whose alpha this
    is; they take 5 for translation): keeps small data from being learned by heart, for twice the work a row. Needs
    dropout; 0: once."""
    clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0: no clipping."""
    max_bad_steps: PositiveInt = 10
    """The run stops after so many updates in a row that were skipped for a non-finite loss or gradient."""
    loss_chunk_rows: PositiveInt | None = None
    """Target positions whose logits exist at the same time: bounds the memory of the output projection. null: 1280 on
    GPUs, 384 on CPUs."""
    attention: Literal["sdpa", "flex"] = "sdpa"
    """Training's attention. sdpa: torch's fused kernels, which compute all pairs of a row and hide those of different
    samples. flex: FlexAttention, compiled at the first step, which leaves out blocks of such pairs; GPUs only, packed
    rows, no dropout of attention's weights. It has not been run on a GPU yet."""
    compile: bool = False
    """Compile each layer with torch.compile, which adds a minute to the start. For GPUs; on CPUs it was slower."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep an exponential moving average of the weights too, `ema = decay x ema + (1 - decay) x weights` after every
    update, in float32, sharded and saved as the master weights are; null: none."""
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    """Be done when evaluations stop getting better."""
    init_from: str | None = None
    """A run directory or checkpoint whose weights the first step starts from (fine-tuning): of a run the newest, the
    trained ones. Its moving average is what `checkpoint average RUN_DIR --last 1 --weights ema` writes."""


class OptimizerConfig(Section):
    """The update rule and its learning rate."""

    name: Literal["adamw", "adamw_rms"] = "adamw"
    """adamw_rms scales each tensor's step by its root mean square, as Adafactor does: the way to train T5 with Adam."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate: reached at the end of warm-up."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of Adam's two moments."""
    eps: PositiveFloat = 1e-9
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices (never of norms, biases or position tables)."""
    schedule: Literal["inverse_sqrt", "linear", "cosine", "constant"] = "inverse_sqrt"
    """Shape after warm-up."""
    warmup_steps: NonNegativeInt = 4000
    """Steps of linear warm-up from 0."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where linear and cosine end, as a share of `lr`."""

    @model_validator(mode="after")
    def _betas_fit(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must each be at least 0 and below 1")
        return self


class ParallelConfig(Section):
    """How ranks share the work."""

    tp_degree: PositiveInt = 1
    """Ranks that share each layer (tensor parallelism)."""
    sequence_parallel: bool = True
    """With tensor parallelism: shard norms and residuals along the sequence too."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed ZeRO shards over data-parallel ranks: nothing; optimizer; and gradients; and parameters. On one
    rank in fp32, 0 is the fastest and needs the least memory: 2 copies gradients, with nobody to share them with."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lives in CPU memory: nothing, optimizer states (stages 1-3), or parameters too (stage 3)."""

    @model_validator(mode="after")
    def _offload_fits(self) -> Self:
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload=optimizer needs zero_stage 1, 2 or 3: stage 0 shards nothing")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(
                f"offload=all needs zero_stage=3, not {self.zero_stage}: only it shards parameters"
            )
        return self


RecomputePolicy = Literal["none", "full", "every_n", "selective"]


class RecomputeConfig(Section):
    """Activation checkpointing, each stack by itself."""

    encoder: RecomputePolicy = "none"
    """full: keep each layer's input and compute the layer again in the backward pass; every_n: every `every`-th layer;
    selective: keep products with weights too, and compute scores, norms and activations again."""
    decoder: RecomputePolicy = "none"
    """As `encoder`, for the decoder."""
    every: PositiveInt = 2
    """With every_n: one layer in so many is recomputed, from the first on."""


class CheckpointConfig(Section):
    """When the run is saved and what is kept."""

    every: PositiveInt = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 3
    """Newest checkpoints that stay; older ones are removed once a newer one is complete."""
    keep_every: PositiveInt | None = None
    """Checkpoints of every so many steps, a multiple of `every`, stay for ever, besides the newest; null: none."""
    best_metric: str | None = None
    """A figure of evaluations, as it stands in `metrics.jsonl` (`eval/SET/bleu`): the checkpoint with the best value is
    saved when it is measured, stays, and is named in `checkpoints/best`; null: none."""
    best_mode: Mode | None = None
    """Which is better, larger or smaller values; null: min of losses and error rates, max of the rest."""
    asynchronous: bool = True
    """Copy to CPU memory and write while training goes on; false: training waits, and the copy's memory is saved."""
    on_failed_save: Literal["go_on", "end"] = "go_on"
    """When a save fails, as on a full disk: an alert, and the next save tries again; or the run ends, every rank, with
    one sentence. Either way the checkpoint before stays whole, and a failed last save gives exit code 1."""
    verify: Literal["size", "sha256"] = "size"
    """What is compared before resuming: sizes of files, or their contents too (every file is read once more)."""

    @model_validator(mode="after")
    def _kept_ones_are_saved(self) -> Self:
        if self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every} must be a multiple of checkpoint.every={self.every}: "
                "of the steps in between none is saved"
            )
        return self


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where an API key and the server answer within seconds, else offline."""
    project: str = "dist_transformer"
    """Project the run belongs to."""
    entity: str | None = None
    """Team or user; null: the account's default."""
    name: str | None = None
    """Name shown; null: the run directory's name."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""


class AlertConfig(Section):
    """When a run asks to be looked at: a row of `event: alert`, a line on the screen, a message of the dashboard."""

    loss_band: NonNegativeFloat = 6.0
    """Divergence: training loss above its running median by so many of its usual deviations; 0: never."""
    throughput_drop_pct: float = Field(default=40.0, ge=0, lt=100)
    """Tokens a second below their running median by so many percent; 0: never."""
    patience: PositiveInt = 3
    """Rows in a row that must be so before either is told."""
    stall_s: NonNegativeFloat = 900.0
    """Seconds without the end of a step; 0: never. Must be longer than an evaluation and a checkpoint take."""
    disk_free_gib: NonNegativeFloat = 5.0
    """Less free space where the run directory is; 0: never."""


class TrackingConfig(Section):
    """What is logged, how often, and where to."""

    every: PositiveInt = 10
    """Steps between lines in `metrics.jsonl` and on the screen."""
    peak_tflops: PositiveFloat | None = None
    """Peak of one device, for MFU; null: a GPU's from a table of data sheets, a CPU's measured with matrix products."""
    alerts: AlertConfig = AlertConfig()
    """When the run asks to be looked at."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run directory too."""
    sinks: tuple[str, ...] = ()
    """Further dashboards by name: entry points of the group `dist_transformer.sinks` (docs/tracking.md)."""


class ProfileConfig(Section):
    """Where a step's time and memory go: a trace for https://ui.perfetto.dev and tables in `RUN_DIR/profile/`."""

    steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step that are traced, as `[10, 13]`; null: none."""
    ranks: tuple[NonNegativeInt, ...] = (0,)
    """Ranks that write a trace."""
    memory_snapshot: bool = False
    """Keep a history of the GPU's allocations and write it when memory runs out, for https://pytorch.org/memory_viz."""

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.steps is not None and self.steps[0] > self.steps[1]:
            raise ValueError(
                f"profile.steps={list(self.steps)} must be the first and the last step, in this order"
            )
        return self


class Config(Section):
    """The whole configuration of a run."""

    run: RunConfig
    model: ModelConfig = ModelConfig()
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    generate: GenerateConfig = GenerateConfig()
    faults: FaultsConfig = FaultsConfig()
    tracking: TrackingConfig = TrackingConfig()
    profile: ProfileConfig = ProfileConfig()
    deepspeed: dict[str, Any] = {}
    """Extra DeepSpeed keys, merged into the configuration built from the fields above."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = []
        if self.train.global_batch_size % self.train.micro_batch_size:
            problems.append(
                f"train.micro_batch_size={self.train.micro_batch_size} does not divide "
                f"train.global_batch_size={self.train.global_batch_size}"
            )
        if self.model.positions == "learned":
            longest = max(self.data.max_source_len, self.data.max_target_len)
            if longest > self.model.max_positions:
                problems.append(
                    f"model.max_positions={self.model.max_positions} is shorter than a row of {longest} tokens: "
                    f"set model.max_positions={longest}"
                )
        if self.evaluate.weights == "ema" and self.train.ema_decay is None:
            problems.append("evaluate.weights=ema needs train.ema_decay: there is no average without it")
        if self.train.r_drop and not _has_dropout(self.model):
            problems.append(
                "train.r_drop needs dropout: without it both passes are the same; set model.dropout, or train.r_drop=0"
            )
        if self.train.attention == "flex":
            problems += _flex_problems(self)
        if self.train.compile:
            problems += _compile_problems(self)
        problems += _tensor_parallel_problems(self.model, self.parallel.tp_degree)
        problems += [
            f"deepspeed.{key} is ours to set: use {ours}"
            for key, ours in OWNED_DEEPSPEED_KEYS.items()
            if _holds(self.deepspeed, key)
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _has_dropout(model: ModelConfig) -> bool:
    """Whether two passes of the same rows can differ."""
    inside = (model.dropout if own is None else own for own in (model.attention_dropout, model.ffn_dropout))
    return any([*inside, model.stack("encoder").dropout, model.stack("decoder").dropout])


def _flex_problems(config: Config) -> list[str]:
    """What FlexAttention does not go with."""
    dropped = (
        config.model.dropout if config.model.attention_dropout is None else config.model.attention_dropout
    )
    problems = {
        "model.attention_dropout=0: its kernels have no dropout": bool(dropped),
        "data.packing=true: its kernels are compiled for rows of one shape": not config.data.packing,
        "recompute none, full or every_n: selective recomputation looks at single operations": "selective"
        in (config.recompute.encoder, config.recompute.decoder),
    }
    return [f"train.attention=flex needs {needed}" for needed, is_missing in problems.items() if is_missing]


def _compile_problems(config: Config) -> list[str]:
    """What a compiled layer does not go with."""
    policies = (config.recompute.encoder, config.recompute.decoder)
    problems = {
        "zero_stage 0, 1 or 2: stage 3 fetches weights inside layers": config.parallel.zero_stage == 3,
        "tp_degree=1: ranks talk inside shared layers": config.parallel.tp_degree > 1,
        "recompute none, full or every_n: the compiler itself chooses what a layer keeps": "selective"
        in policies,
        "rows of one shape: leave data.bucket_tokens out": config.data.bucket_tokens is not None,
    }
    return [f"train.compile needs {needed}" for needed, is_missing in problems.items() if is_missing]


def _tensor_parallel_problems(model: ModelConfig, tp: int) -> list[str]:
    """What the ranks of a tensor-parallel group cannot share equally."""
    problems = []
    for side in ("encoder", "decoder"):
        stack = model.stack(side)
        for name, n in (("n_heads", stack.n_heads), ("d_ff", stack.d_ff)):
            if n % tp:
                problems.append(
                    f"parallel.tp_degree={tp} does not divide the {side}'s {name}={n}: "
                    f"try tp_degree={_divisor_below(n, tp)}, or a {name} that is a multiple of {tp}"
                )
        n_kv = stack.n_kv_heads
        if n_kv % tp and tp % n_kv:
            problems.append(
                f"parallel.tp_degree={tp} neither divides the {side}'s n_kv_heads={n_kv} nor is a multiple of it: "
                f"try tp_degree={_divisor_below(n_kv, tp)}, or another n_kv_heads"
            )
    name, n = ("vocab_size", model.vocab_size) if model.vocab_size else ("pad_vocab_to", model.pad_vocab_to)
    if n % tp:
        problems.append(
            f"parallel.tp_degree={tp} does not divide model.{name}={n}: set model.{name}={-(-n // tp) * tp}"
        )
    return problems


def _divisor_below(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit`."""
    return max(divisor for divisor in range(1, limit + 1) if n % divisor == 0)


def _holds(tree: dict[str, Any], path: str) -> bool:
    """Whether a nested dictionary has a key, written with dots."""
    first, _, rest = path.partition(".")
    if first not in tree:
        return False
    return not rest or (isinstance(tree[first], dict) and _holds(tree[first], rest))
