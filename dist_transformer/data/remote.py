"""Files that are not on this machine: fetched through fsspec, whole, with retries."""

import errno
import random
import time
from contextlib import closing
from functools import cache
from io import BytesIO
from typing import Any, BinaryIO

from dist_transformer.config.data import RemoteConfig
from dist_transformer.errors import DataError

_PIECE = 4 * 2**20
_LONGEST_PAUSE_S = 60.0
_LARGEST_SMALL_FILE = 2**30
_FULL = {errno.ENOSPC, errno.EDQUOT}
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError"}


class _NotThatFileError(Exception):
    """What came is not what the manifest describes."""


@cache
def fetch_bytes(url: str, options: RemoteConfig) -> bytes:
    """The content of a small file. Fetched once by a process: what it describes must not change under a run.

    Raises:
        DataError: it cannot be had.
    """
    content = BytesIO()
    download(url, content, None, options, _LARGEST_SMALL_FILE)
    return content.getvalue()


def size_of(url: str, options: RemoteConfig) -> int:
    """Bytes of a file as its server tells them; 0 where it does not. What is wrong is found by fetching it."""
    filesystem, path = _filesystem(url, options.timeout_s)
    try:
        return int(filesystem.size(path) or 0)
    except Exception:  # what a file system raises depends on which one it is
        return 0


def download(
    url: str, file: BinaryIO, size: int | None, options: RemoteConfig, limit: int | None = None
) -> None:
    """Fetch a file; continue where `file` ends if its size is known and the server allows, else from the start.

    Args:
        url: What to fetch.
        file: Where to, open for reading and writing; on failure it keeps what came, for another try.
        size: Bytes that it has; None: unknown.
        options: Attempts, pauses, patience.
        limit: Bytes that it has at most, where `size` is unknown.

    Raises:
        DataError: no attempt succeeded, or another would not help: it is not there, or not allowed.
        OSError: this machine's disk.
    """
    pause = options.backoff_s
    for attempt in range(1, options.attempts + 1):
        try:
            _continue(url, file, size, limit, options)
            return
        except _LocalDiskError as error:
            raise error.cause from error
        except Exception as error:  # what a file system raises depends on which one it is
            if sentence := _hopeless(url, error):
                raise DataError(sentence) from error
            if getattr(error, "status", None) == 416:  # the server's file ends before what we have of it
                file.truncate(0)
            if attempt == options.attempts:
                tried = f"after {attempt} attempts" if attempt > 1 else "(data.remote.attempts=1)"
                raise DataError(
                    f"{url} is unreachable {tried}: {_describe(error)}; see that it can be opened from this "
                    "machine"
                ) from error
        # Many processes that failed together should not come back together. Its own source of chance: the
        # seeded ones decide the run.
        time.sleep(pause * random.SystemRandom().uniform(0.5, 1.0))
        pause = min(2 * pause, _LONGEST_PAUSE_S)


class _LocalDiskError(Exception):
    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _continue(url: str, file: BinaryIO, size: int | None, limit: int | None, options: RemoteConfig) -> None:
    have = file.seek(0, 2)
    if have == size:
        return
    if size is None or have > size:
        have = file.seek(file.truncate(0))
    source, begin = _open_at(url, have, options)
    with closing(source):
        if begin != have:
            have = file.seek(file.truncate(begin))
        limit = limit if size is None else size
        while piece := source.read(_PIECE):
            have += len(piece)
            if limit is not None and have > limit:
                file.truncate(0)
                raise _NotThatFileError(f"it has more than {limit} bytes")
            try:
                file.write(piece)
            except OSError as error:
                raise _LocalDiskError(error) from error
    if size is not None and have < size:
        raise _NotThatFileError(f"it ended after {have} of {size} bytes")


def _open_at(url: str, position: int, options: RemoteConfig) -> tuple[Any, int]:
    """A stream of the file's bytes and the position of its first: `position`, or 0."""
    filesystem, path = _filesystem(url, options.timeout_s)
    if url.split("://", 1)[0].lower() in ("http", "https"):
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={position}-"} if position else {})
        # A block size of 0 streams the body; with a size, the file system does not ask for it first.
        stream = filesystem.open(path, "rb", block_size=0, size=1, headers=headers)
        partial = stream.r.status == 206 and stream.r.headers.get("Content-Range", "").startswith(
            f"bytes {position}-"
        )
        return stream, position if partial else 0
    stream = filesystem.open(path, "rb", cache_type="none")
    stream.seek(position)
    return stream, position


def _filesystem(url: str, timeout_s: float) -> tuple[Any, str]:
    # Half a second, and not needed for local folders.
    import fsspec

    scheme = url.split("://", 1)[0].lower()
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        patience = ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        options = {"client_kwargs": {"timeout": patience, "trust_env": True}}
    elif scheme in ("s3", "s3a"):
        options = {"config_kwargs": {"connect_timeout": timeout_s, "read_timeout": timeout_s}}
    elif scheme in ("gs", "gcs"):
        options = {"timeout": timeout_s}
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        how = f"pip install {package} (or dist_transformer[{scheme[:2]}])" if package else str(error)
        raise DataError(f"{url} needs a package that is not installed: {how}") from error
    except ValueError as error:
        raise DataError(f"{url}: {error}; http, https, s3 and gs are what is usual") from error
    return filesystem, path


def _hopeless(url: str, error: Exception) -> str:
    """The sentence for an error that another attempt would not mend; empty for others."""
    if isinstance(error, DataError):
        return str(error)
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410, "404"):
        return f"{url} does not exist: see data.train, data.eval, or the folder's manifest.json"
    refused = isinstance(error, PermissionError) or status in (401, 403, "401", "403")
    if refused or type(error).__name__ in _NO_CREDENTIALS:
        return (
            f"{url} may not be read ({_describe(error)}): give this machine credentials for it, as its file "
            "system in fsspec expects them (for s3 and gs, those of AWS and Google Cloud)"
        )
    return ""


def _describe(error: Exception) -> str:
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    if status is not None:
        return f"the server answered {status} {message or ''}".strip()
    text = " ".join(str(error).split())
    return text if isinstance(error, _NotThatFileError) else f"{type(error).__name__}: {text}".rstrip(": ")


def is_disk_full(error: OSError) -> bool:
    """Whether the disk or the user's share of it is full."""
    return error.errno in _FULL
