"""Remote shards on local disk: each fetched once by a node, checked, and kept until room is needed.

A file is named by the sha256 of its content, so that equal shards of several places are one, and what has its
final name is known to be whole. While it is fetched it is `DIGEST.SIZE.partial`, locked by who fetches it.
"""

import fcntl
import hashlib
import os
import queue
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import FileIO
from pathlib import Path

from dist_transformer.config.data import RemoteConfig
from dist_transformer.data.remote import download, fetch_bytes, is_disk_full, size_of
from dist_transformer.errors import DataError

_WHOLE = re.compile(r"[0-9a-f]{64}")
_PARTIAL = re.compile(r"[0-9a-f]{64}\.(\d+)\.partial")
_N_FETCHERS = 2
_MOST_WAITING = 256


class ShardCache:
    """The folder `data.remote.cache_dir`, shared by all processes of a machine."""

    def __init__(self, options: RemoteConfig) -> None:
        self.options = options
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder = Path(options.cache_dir or Path(home) / "dist_transformer" / "shards")
        self.tokenizers = self.folder / "tokenizers"
        """Tokenizers of remote folders; small, and never removed."""
        self._limit = int(options.cache_gib * 2**30)

    def open(self, url: str, size: int, sha256: str) -> FileIO:
        """The shard, open for reading; fetched if it is not here yet.

        Args:
            url: Where it is.
            size: Its bytes.
            sha256: Of its content.

        Raises:
            DataError: it cannot be fetched, is not what the manifest says, or does not fit the cache.
        """
        while True:
            with self._explain_disk(), suppress(FileNotFoundError):
                file = (self.folder / sha256).open("rb", buffering=0)
                os.utime(file.fileno())
                return file
            # Opened before the lock goes: from then on it may be removed, which an open file survives.
            with self._fetched(url, size, sha256) as path, suppress(FileNotFoundError):
                return path.open("rb", buffering=0)

    def fetch_unknown(self, url: str) -> FileIO:
        """A file of which nothing is known yet, open for reading.

        Raises:
            DataError: as `open`.
        """
        size = size_of(url, self.options)
        partial = self.folder / f"{hashlib.sha256(url.encode()).hexdigest()}.{size}.partial"
        with self._explain_disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            with _lock(partial) as file:
                self._make_room(size, partial)
                download(url, file, None, self.options, self._limit)
                file.seek(0)
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                whole = partial.replace(self.folder / sha256)
                return whole.open("rb", buffering=0)

    def has(self, sha256: str) -> bool:
        """Whether the file of this content is here."""
        return (self.folder / sha256).exists()

    def keep_tokenizer(self, url: str, sha256: str) -> str:
        """The name under `tokenizers` of a remote folder's tokenizer; fetched if it is not here yet.

        Raises:
            DataError: it cannot be had, or is not the one that the shards were made with.
        """
        path = self.tokenizers / f"{sha256}.json"
        with self._explain_disk():
            if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                return path.name
        content = fetch_bytes(url, self.options)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(
                f"the tokenizer does not match the shards: {url} is not the file they were made with; "
                "restore it or prepare again"
            )
        with self._explain_disk():
            self.tokenizers.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            partial.write_bytes(content)
            partial.replace(path)
        return path.name

    @contextmanager
    def _fetched(self, url: str, size: int, sha256: str) -> Iterator[Path]:
        """The file's path, while nobody else can fetch it."""
        whole, partial = self.folder / sha256, self.folder / f"{sha256}.{size}.partial"
        if size > self._limit:
            raise DataError(
                f"{url} has {size / 2**30:.2f} GiB, more than data.remote.cache_gib={self.options.cache_gib}: "
                "raise it"
            )
        with self._explain_disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            file = _lock(partial)
        with file:
            if whole.exists():  # another process had the lock, and is done
                partial.unlink()
            else:
                with self._explain_disk():
                    self._make_room(size, partial)
                    self._fill(file, partial, url, size, sha256)
                    partial.replace(whole)
            yield whole

    def _fill(self, file: FileIO, partial: Path, url: str, size: int, sha256: str) -> None:
        """Download and check. What was continued from another process's beginning gets a second chance."""
        for _ in range(2):
            try:
                download(url, file, size, self.options)
            except (DataError, OSError) as error:
                if file.seek(0, 2) == 0 or (isinstance(error, OSError) and is_disk_full(error)):
                    partial.unlink()
                raise
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                return
            file.truncate(0)
        partial.unlink()
        raise DataError(
            f"{url} is not the shard that manifest.json describes (its sha256 differs): upload it again, or "
            "prepare again"
        )

    def _make_room(self, size: int, mine: Path) -> None:
        """Remove what was not used for longest until `size` more bytes fit; nothing that is being fetched."""
        with _lock(self.folder / "lock"):
            found: list[tuple[float, int, Path]] = []
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):  # another process renamed it
                    status, path = entry.stat(), Path(entry.path)
                    if _WHOLE.fullmatch(entry.name):
                        found.append((status.st_mtime, status.st_size, path))
                    elif (match := _PARTIAL.fullmatch(entry.name)) and path != mine:
                        found.append((status.st_mtime, int(match[1]), path))
            total = size + sum(n_bytes for _, n_bytes, _ in found)
            for _, n_bytes, path in sorted(found):
                if total <= self._limit:
                    break
                if path.suffix != ".partial":
                    path.unlink(missing_ok=True)
                elif not _remove_abandoned(path):
                    continue
                total -= n_bytes

    @contextmanager
    def _explain_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if is_disk_full(error):
                raise DataError(
                    f"the disk of data.remote.cache_dir={self.folder} is full: lower data.remote.cache_gib="
                    f"{self.options.cache_gib} to what it holds, or name another folder"
                ) from error
            raise DataError(
                f"data.remote.cache_dir={self.folder} cannot be written ({error.strerror}): name a folder on "
                "local disk"
            ) from error


def _lock(path: Path) -> FileIO:
    """Open and lock a file that others may rename or remove once they hold the lock."""
    while True:
        file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def _remove_abandoned(path: Path) -> bool:
    """Remove a partial file unless somebody is fetching it."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        path.unlink()
    return True


class Fetchers:
    """A few threads of this process that fetch shards which will be wanted soon.

    They are daemons: a process that ends does not wait for them, and another one continues their files.
    """

    def __init__(self, options: RemoteConfig) -> None:
        self._cache = ShardCache(options)
        self._wanted: queue.Queue[tuple[str, int, str]] = queue.Queue(_MOST_WAITING)
        self._asked: set[str] = set()
        for _ in range(_N_FETCHERS):
            threading.Thread(target=self._fetch_all, name="fetch-shards", daemon=True).start()

    def ask(self, url: str, size: int, sha256: str) -> None:
        """Fetch a shard in the background, unless it is here, was asked for, or too many wait already."""
        if sha256 not in self._asked and not self._cache.has(sha256):
            with suppress(queue.Full):
                self._asked.add(sha256)
                self._wanted.put_nowait((url, size, sha256))

    def _fetch_all(self) -> None:
        while True:
            url, size, sha256 = self._wanted.get()
            # Who opens the shard meets the same trouble and tells it.
            with suppress(DataError):
                self._cache.open(url, size, sha256).close()
            self._asked.discard(sha256)


@cache
def fetchers(options: RemoteConfig) -> Fetchers:
    """This process's threads."""
    return Fetchers(options)
