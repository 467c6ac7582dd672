"""Reading weights and Adam's moments out of a checkpoint, for any layout: each piece from whichever files have it."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_transformer.checkpoints.folder import check_files, read_index
from dist_transformer.checkpoints.pieces import Copy, Piece, shared, whole
from dist_transformer.config import Weights
from dist_transformer.errors import CheckpointError

Kind = Literal["master", "exp_avg", "exp_avg_sq", "ema"]
KINDS: tuple[Kind, ...] = ("master", "exp_avg", "exp_avg_sq")
"""What is kept of every element, in float32: the weight and Adam's two moments. With `train.ema_decay`, the weight's
moving average too."""
_KIND_OF: dict[Weights, Kind] = {"current": "master", "ema": "ema"}

# Elements that are read at a time: what memory is bounded by, besides one parameter's target.
_CHUNK = 2**24


class CheckpointReader:
    """Fills tensors from a checkpoint's files; reads only what is asked for."""

    def __init__(self, path: Path) -> None:
        """Raises:
        CheckpointError: if the index cannot be read.
        """
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Every parameter of the model, with its whole shape."""
        self._sources: dict[str, list[tuple[str, int, Piece]]] = defaultdict(list)
        index = read_index(path)
        self._with_pieces = [file for file, pieces in index.items() if pieces]
        for file, pieces in index.items():
            first = 0
            for piece in pieces:
                self.shapes[piece.name] = piece.shape
                self._sources[piece.name].append((file, first, piece))
                first += piece.length
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.clear()
        self._stack.close()

    @torch.no_grad()
    def fill(self, kind: Kind, piece: Piece, out: Tensor) -> None:
        """Copy a piece's elements into a flat tensor of as many, on any device; a kind that was not saved is zero.

        Raises:
            CheckpointError: if a file is damaged, or the checkpoint does not have all of it.
        """
        if piece.name not in self._sources:
            raise CheckpointError(
                f"{self.path} has no parameter {piece.name}: it is a checkpoint of another model"
            )
        n_copied = 0
        for file, first, source in self._sources[piece.name]:
            try:
                found = list(shared(source, piece))
            except ValueError as error:
                raise CheckpointError(f"{self.path} does not fit this model: {error}") from None
            for copy in found:
                if not self._copy(kind, file, first, copy, out):
                    out.zero_()
                    return
                n_copied += copy.n_rows * copy.n_columns
        if n_copied != piece.length:
            raise CheckpointError(
                f"{self.path}: {n_copied:,} of the {piece.length:,} elements of {piece.name} are in its files: "
                f"it is damaged"
            )

    def has(self, kind: Kind) -> bool:
        """Whether this kind was saved.

        Raises:
            CheckpointError: if a file is damaged.
        """
        for file in self._with_pieces:
            try:
                if kind not in self._open(file).keys():  # noqa: SIM118 - not a dictionary
                    return False
            except (SafetensorError, OSError) as error:
                raise self._damage(file, error) from None
        return True

    def require(self, weights: Weights) -> None:
        """Raises:
        CheckpointError: there are no such weights in it.
        """
        if not self.has(_KIND_OF[weights]):
            raise CheckpointError(f"{self.path} has no averaged weights: its run had no train.ema_decay")

    def weights(self, which: Weights = "current") -> Iterator[tuple[str, Tensor]]:
        """Every whole parameter in float32, one after the other.

        Raises:
            CheckpointError: as for `fill`, or there are no such weights in it.
        """
        self.require(which)
        for name in self.shapes:
            yield name, self.weight(name, which)

    def weight(self, name: str, which: Weights = "current") -> Tensor:
        """A whole parameter in float32.

        Raises:
            CheckpointError: as for `fill`.
        """
        weight = torch.empty(self.shapes[name])
        self.fill(_KIND_OF[which], whole(name, self.shapes[name]), weight.view(-1))
        return weight

    def tensor(self, file: str, name: str) -> Tensor | None:
        """A whole tensor of one file, or None where it is not there.

        Raises:
            CheckpointError: if the file is damaged.
        """
        try:
            opened = self._open(file)
            found: Tensor | None = opened.get_tensor(name) if name in opened.keys() else None  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise self._damage(file, error) from None
        return found

    def metadata(self, file: str) -> dict[str, str]:
        """The strings in one file's header.

        Raises:
            CheckpointError: if the file is damaged.
        """
        try:
            return dict(self._open(file).metadata() or {})
        except (SafetensorError, OSError) as error:
            raise self._damage(file, error) from None

    def _copy(self, kind: Kind, file: str, first: int, copy: Copy, out: Tensor) -> bool:
        """Copy a rectangle, some rows at a time; False where the file has no tensor of that kind."""
        at_once = max(1, _CHUNK // max(1, copy.source_stride))
        try:
            opened = self._open(file)
            if kind not in opened.keys():  # noqa: SIM118 - not a dictionary
                return False
            flat = opened.get_slice(kind)
            for row in range(0, copy.n_rows, at_once):
                n_rows = min(at_once, copy.n_rows - row)
                begin = first + copy.source + row * copy.source_stride
                read = flat[begin : begin + (n_rows - 1) * copy.source_stride + copy.n_columns]
                size = (n_rows, copy.n_columns)
                target = out[copy.target + row * copy.target_stride :]
                target.as_strided(size, (copy.target_stride, 1)).copy_(
                    read.as_strided(size, (copy.source_stride, 1))
                )
        except (SafetensorError, OSError, RuntimeError) as error:
            raise self._damage(file, error) from None
        return True

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(self.path / file, framework="pt"))
        return self._files[file]

    def _damage(self, file: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.path / file}: cannot be loaded: {str(error).splitlines()[0]}")


class StoredWeights(Mapping[str, Tensor]):
    """A checkpoint's whole weights in float32 by name, each read when it is asked for and not kept.

    Raises:
        CheckpointError: if they cannot be read, or are not there.
    """

    def __init__(self, path: Path, which: Weights = "current") -> None:
        check_files(path)
        self._reader, self._which = CheckpointReader(path), which
        self._reader.require(which)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._reader.shapes:
            raise KeyError(name)
        return self._reader.weight(name, self._which)

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader.shapes)

    def __len__(self) -> int:
        return len(self._reader.shapes)


def load_weights(path: Path, which: Weights = "current") -> dict[str, Tensor]:
    """All of a checkpoint's weights in float32, by the model's own names, whatever layout wrote them.

    Raises:
        CheckpointError: if they cannot be read, or are not there.
    """
    check_files(path)
    with CheckpointReader(path) as reader:
        return dict(reader.weights(which))
