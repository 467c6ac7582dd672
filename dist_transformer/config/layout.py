"""What follows from a configuration with a number of ranks, or of tokens. Imports no torch."""

from dist_transformer.config.schema import Config
from dist_transformer.errors import ConfigError


def data_parallel_size(world_size: int, tp_degree: int) -> int:
    """How many replicas of the model the world holds.

    Raises:
        ConfigError: if the world cannot be divided so.
    """
    if world_size % tp_degree:
        raise ConfigError(
            f"parallel.tp_degree={tp_degree} does not divide the {world_size} ranks of this run"
        )
    return world_size // tp_degree


def grad_accum_steps(config: Config, dp_size: int) -> int:
    """Micro-steps of one update: global batch / (micro batch x data-parallel ranks).

    Raises:
        ConfigError: if it does not divide.
    """
    train = config.train
    rows = train.micro_batch_size * dp_size
    if train.global_batch_size % rows:
        fits = [
            n for n in range(1, train.global_batch_size + 1) if train.global_batch_size % (n * dp_size) == 0
        ]
        near = sorted(sorted(fits, key=lambda n: abs(n - train.micro_batch_size))[:3])
        hint = (
            f"try train.micro_batch_size={' or '.join(map(str, near))}"
            if near
            else f"make train.global_batch_size a multiple of {dp_size}"
        )
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{train.micro_batch_size} x {dp_size} data-parallel ranks: {hint}"
        )
    return train.global_batch_size // rows


def with_vocabulary(config: Config, n_tokens: int) -> Config:
    """The configuration with `model.vocab_size` known.

    Raises:
        ConfigError: if the model's vocabulary is smaller than the tokenizer's.
    """
    given = config.model.vocab_size
    if given is not None and given < n_tokens:
        raise ConfigError(
            f"model.vocab_size={given} is smaller than the tokenizer's {n_tokens} tokens: "
            f"set it to null, or to {n_tokens} or more"
        )
    unit = config.model.pad_vocab_to
    size = given if given is not None else -(-n_tokens // unit) * unit
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})
