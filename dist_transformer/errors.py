"""Errors that a person caused and can mend: one clear sentence each, no traceback.

Every error raised on purpose for bad input is a `UserError`; the command line prints its sentence and exits
with its code. Anything else is a bug and keeps its traceback.
"""


class UserError(Exception):
    """Something the user can mend. The message names the file, key or shard, and the fix."""

    exit_code = 1
    on_every_rank = False
    """True once every rank raises it: then one of them alone need print it."""


class ConfigError(UserError):
    """Bad arguments or configuration: found before any work began."""

    exit_code = 2


class DataError(UserError):
    """Bad input text, shards, manifest or tokenizer."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or that belongs to another model or layout."""


class LaunchError(UserError):
    """A job that cannot be submitted, found or stopped."""


class DivergenceError(UserError):
    """Losses or gradients that are not finite, again and again."""


class PreflightError(UserError):
    """A node that is not fit to train."""
