"""Where shards are: local folders, several at once by a brace pattern, and URLs."""

import re
from math import prod
from pathlib import Path

from braceexpand import braceexpand

from dist_transformer.errors import DataError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_MOST_PLACES = 100_000


def is_url(location: str) -> bool:
    """Whether it is opened through fsspec rather than as a path."""
    return _SCHEME.match(location) is not None


def refuse_commands(location: str) -> None:
    """Raise a `DataError` for what WebDataset would run as a command."""
    if location.startswith("pipe:") or location.lstrip().startswith("|"):
        raise DataError(
            f"{location!r} is a command: shards are untrusted input and pipes are not run; use a file or a URL"
        )
    if "::" in location.split("/", 1)[0]:
        raise DataError(f"{location!r} chains several file systems: name one path or URL")


def expand_braces(location: str) -> list[str]:
    """The places that a pattern such as `shards/{books,news}` or `shards/part-{0..7}` names, in its order.

    A path that exists under its literal name is itself.

    Raises:
        DataError: the pattern is malformed, names too many places, or is a command.
    """
    refuse_commands(location)
    if "{" not in location or (not is_url(location) and Path(location).exists()):
        return [location]
    # Ranges are counted first: expanding one builds them whole.
    sizes = (abs(int(end) - int(begin)) + 1 for begin, end in _RANGE.findall(location))
    if prod(sizes) > _MOST_PLACES:
        raise DataError(f"{location} names more than {_MOST_PLACES} places")
    try:
        places = list(braceexpand(location))
    except ValueError as error:
        raise DataError(f"{location}: its braces do not match ({error})") from error
    if len(set(places)) < len(places):
        raise DataError(f"{location} names a place twice")
    return places


def join_location(base: str, name: str) -> str:
    """The location of a file in a folder or under a URL."""
    return f"{base.rstrip('/')}/{name}" if is_url(base) else str(Path(base) / name)


def check_file_name(name: object, listed_in: str) -> None:
    """Raise a `DataError` for names that are not plain: they could lead out of their folder."""
    text = name if isinstance(name, str) else ""
    if not text or re.search(r"[/\\:\x00-\x1f|]", text) or text.startswith("."):
        raise DataError(
            f"{listed_in} lists shard {name!r}: only plain file names of the same folder are read"
        )
