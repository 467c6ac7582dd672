"""The stages of a preparation: read, duplicates, tokenizer, tokenise, write shards; see `prepare`."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path

from dist_transformer.data.dedup import find_duplicates
from dist_transformer.data.documents import DocumentReader, Scan, Segment, scan
from dist_transformer.data.folder import WORK_NAME, Recipe, claim_folder
from dist_transformer.data.hashing import Shuffle
from dist_transformer.data.inputs import Input, check_inputs
from dist_transformer.data.manifest import (
    SPLITS,
    TOKENIZER_NAME,
    Kind,
    Manifest,
    ShardInfo,
    Split,
    sha256_of,
)
from dist_transformer.data.pool import Workers, count_with, progress
from dist_transformer.data.shares import MIN_SAMPLES_PER_SHARD, SHARD_BYTES, Share, default_shards
from dist_transformer.data.spill import RAW_NAME, Part, ShardTask, build_shard, dtype_of, tokenise_parts
from dist_transformer.data.summary import PreparedSummary
from dist_transformer.data.tokenizer import TextTokenizer, check_vocab_size
from dist_transformer.errors import DataError

TOKENIZER_TEXT_BYTES = 100 << 20
"""At most about so much text trains the tokenizer: a random part of the training documents where there is
more.
"""
MAX_HELD_OUT = 2000
_SHUFFLE_KEY = 0x5EED
_MIN_PART_BYTES, _MAX_PART_BYTES, _MAX_PARTS = 8 << 20, 64 << 20, 512
_PARALLEL_BYTES = 4 << 20
"""Less text than this is not worth starting processes for."""
_MAX_NAMED = 5


class Preparation:
    """One run of the stages.

    Args:
        recipe: What decides the bytes that are written.
        out: The folder to write.
        inputs: Training text of this share.
        held: Held-out text from files of its own; written by the first share alone.
        tokenizer: A `tokenizer.json` to use instead of training one.
        workers: Processes; None: one per core.
        overwrite: Replace what an earlier preparation wrote.
        share: Which part of the whole this is.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        inputs: Sequence[Input],
        held: Sequence[Input],
        tokenizer: str | Path | None,
        workers: int | None,
        overwrite: bool,
        share: Share,
    ) -> None:
        recipe.check()
        check_inputs(inputs, held)
        self.recipe, self.out, self.share = recipe, out, share
        self.inputs, self.has_held_files = inputs, bool(held)
        self.held = held if recipe.dedup or share.task == 0 else []
        self.given_tokenizer = None if tokenizer is None else load_given(Path(tokenizer))
        self.workers = Workers(workers or len(os.sched_getaffinity(0)))
        self.overwrite = overwrite
        self.work = out / WORK_NAME
        if self.given_tokenizer is None:
            check_vocab_size(recipe.vocab_size)

    def run(self) -> PreparedSummary:
        """Do what is left to do.

        Raises:
            DataError: bad input or an output folder that is not ours to write.
        """
        started = time.monotonic()
        with self.workers:
            manifest = self._run()
        shutil.rmtree(self.work, ignore_errors=True)
        return PreparedSummary.of(manifest, time.monotonic() - started)

    def _run(self) -> Manifest:
        train, held = self._scan()
        n_documents = sum(segment.n_documents for found in train for segment in found.segments)
        self._check_counts(n_documents)
        digest = self.given_tokenizer.sha256 if self.given_tokenizer else None
        description = self.recipe.describe([*train, *held], len(held), digest, self.share)
        claim_folder(self.out, description, self.overwrite)
        self.work.mkdir(parents=True, exist_ok=True)
        parts = self._build_parts("train", train)
        held_parts = self._build_parts("eval", held)
        if self.recipe.dedup:
            parts, held_parts = self._leave_out_duplicates(parts, held_parts)
            n_documents = sum(part.n_documents for part in parts)
            self._check_counts(n_documents)
        if self.share.task:
            held_parts = []
        parts = _number(parts, Shuffle(n_documents, self.recipe.seed, _SHUFFLE_KEY))
        held_parts = _number(held_parts, None)
        n_held_out = self._count_held_out(n_documents)
        tokenizer = self._make_tokenizer(parts, n_held_out)
        token_dtype = "u16" if tokenizer.vocab_size <= 1 << 16 else "u32"
        dtype = RAW_NAME if self.recipe.raw else token_dtype
        self._tokenise([*parts, *held_parts], tokenizer, dtype)
        n_held = sum(part.n_documents for part in held_parts) or n_held_out
        tasks = self._shard_tasks("train", parts, n_held_out, n_documents, dtype)
        tasks += self._shard_tasks("eval", held_parts or parts, 0, n_held, dtype)
        shards = self._write_shards(tasks, tokenizer, dtype)
        scans = [*train, *held] if self.share.task == 0 else train
        manifest = Manifest(
            root=self.out,
            kind=self.recipe.kind,
            train=shards["train"],
            eval=shards["eval"],
            tokenizer_sha256=sha256_of(self.out / TOKENIZER_NAME),
            vocab_size=tokenizer.vocab_size,
            token_dtype=token_dtype,
            samples="raw" if self.recipe.raw else "tokens",
            counts={
                "n_empty": sum(found.n_empty for found in scans),
                "n_bad_lines": sum(found.n_bad_lines for found in scans),
                "n_duplicates": sum(part.n_duplicates for part in (*parts, *held_parts)),
                "n_split": sum(part.files.totals()["n_split"] for part in (*parts, *held_parts)),
            },
        )
        manifest.save()
        return manifest

    def _scan(self) -> tuple[list[Scan], list[Scan]]:
        """Read every input once; nothing is written before all of them are known to be good."""
        inputs = [*self.inputs, *self.held]
        sizes = [sum(Path(name).stat().st_size for name in source.files) for source in inputs]
        if sum(sizes) < _PARALLEL_BYTES:
            self.workers.n_workers = 1
        tasks = list(enumerate(inputs))
        with progress("reading", sum(sizes)) as advance:
            finished = self.workers.run(_scan_task, tasks)
            scans = dict(count_with(finished, advance, lambda found: sizes[found[0]]))
        train = [scans[i] for i in range(len(self.inputs))]
        held = [scans[i] for i in range(len(self.inputs), len(inputs))]
        for group, given in ((train, self.inputs), (held, self.held)):
            if given and not any(segment.n_documents for found in group for segment in found.segments):
                names = [name for source in given for name in source.files]
                more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
                raise DataError(f"there is no text in {', '.join(names[:_MAX_NAMED])}{more}")
        return train, held

    def _check_counts(self, n_documents: int) -> None:
        """Refuse more held-out documents or shards than there are documents."""
        n_held_out = self._count_held_out(n_documents)
        if n_held_out >= n_documents:
            raise DataError(
                f"held_out={n_held_out} leaves nothing to train on: there are {n_documents} documents"
            )
        n_train = n_documents - n_held_out
        if self.recipe.n_shards is not None and self.share.of(self.recipe.n_shards) > n_train:
            raise DataError(
                f"{self.share.of(self.recipe.n_shards)} shards are more than the {n_train} training "
                f"documents: use --shards {n_train * self.share.n_tasks} or fewer"
            )

    def _count_held_out(self, n_documents: int) -> int:
        wanted = self.recipe.held_out
        if self.has_held_files:
            if wanted:
                raise DataError("held_out and files of held-out text exclude each other: give one of the two")
            return 0
        if wanted is not None:
            return self.share.of(wanted)
        if n_documents < 2:
            return 0
        return max(int(self.share.task == 0), min(n_documents // 100, self.share.of(MAX_HELD_OUT)))

    def _build_parts(self, split: Split, scans: list[Scan]) -> list[Part]:
        pieces = _cut([segment for found in scans for segment in found.segments])
        longest = self.recipe.max_document_tokens
        return [Part(self.work, split, i, tuple(segments), longest) for i, segments in enumerate(pieces)]

    def _leave_out_duplicates(self, parts: list[Part], held: list[Part]) -> tuple[list[Part], list[Part]]:
        """The first of equal documents is kept; held-out files come first, so that none of theirs is trained on."""
        everything = [*held, *parts]
        groups = [tuple(part.segments for part in group) for group in _group(everything)]
        found, counts = find_duplicates(self.work / "duplicates", groups, self.workers)
        marked = [
            replace(part, duplicates=(found, i), n_duplicates=counts[i]) for i, part in enumerate(everything)
        ]
        return marked[len(held) :], marked[: len(held)]

    def _make_tokenizer(self, parts: list[Part], n_held_out: int) -> TextTokenizer:
        path = self.out / TOKENIZER_NAME
        if not path.exists():
            if self.given_tokenizer is not None:
                tokenizer = self.given_tokenizer
            else:
                n_documents = sum(part.n_documents for part in parts)
                share = min(1.0, TOKENIZER_TEXT_BYTES / max(sum(part.n_bytes for part in parts), 1))
                end = n_held_out + max(1, int((n_documents - n_held_out) * share))
                with progress("training the tokenizer", end - n_held_out) as advance:
                    texts = _texts(parts, n_held_out, end)
                    counted = count_with(texts, advance, lambda _: 1)
                    tokenizer = TextTokenizer.train(counted, self.recipe.vocab_size, self.recipe.model)
            partial_path = path.with_name(path.name + ".partial")
            tokenizer.save(partial_path)
            partial_path.replace(path)
        return TextTokenizer.load(path)

    def _tokenise(self, parts: list[Part], tokenizer: TextTokenizer, dtype: str) -> None:
        path = self.out / TOKENIZER_NAME
        function = partial(_tokenise_task, tokenizer_path=path, sha256=tokenizer.sha256, dtype=dtype)
        with progress("tokenising", sum(part.n_bytes for part in parts)) as advance:
            for amount in self.workers.run(function, _group(parts)):
                advance(amount)

    def _shard_tasks(
        self, split: Split, parts: list[Part], first: int, end: int, dtype: str
    ) -> list[ShardTask]:
        """The shards of a split that hold the documents at the places from `first` to `end` of these parts."""
        if first == end:
            return []
        n_shards = self._count_shards(split, parts, end - first, dtype)
        bounds = [first + (end - first) * i // n_shards for i in range(n_shards + 1)]
        return [
            ShardTask(self.out, self.work, split, i, bounds[i], bounds[i + 1], parts[0].split, len(parts))
            for i in range(n_shards)
        ]

    def _write_shards(
        self, tasks: list[ShardTask], tokenizer: TextTokenizer, dtype: str
    ) -> dict[Split, tuple[ShardInfo, ...]]:
        path = self.out / TOKENIZER_NAME
        function = partial(
            _shard_task, kind=self.recipe.kind, tokenizer_path=path, sha256=tokenizer.sha256, dtype=dtype
        )
        with progress("writing shards", len(tasks)) as advance:
            finished = dict(count_with(self.workers.run(function, tasks), advance, lambda _: 1))
        return {
            split: tuple(finished[task.file] for task in tasks if task.split == split) for split in SPLITS
        }

    def _count_shards(self, split: Split, parts: list[Part], n_chosen: int, dtype: str) -> int:
        n_documents = sum(part.n_documents for part in parts)
        n_tokens = sum(part.files.totals()["n_tokens"] for part in parts)
        n_bytes = dtype_of(dtype).itemsize * n_tokens
        if split == "eval":
            return min(n_chosen, 1 + n_bytes * n_chosen // n_documents // SHARD_BYTES)
        if self.recipe.n_shards is not None:
            return self.share.of(self.recipe.n_shards)
        longest = n_tokens if self.recipe.raw else self.recipe.max_document_tokens or n_tokens
        n_samples = max(n_chosen, n_tokens // max(1, longest) * n_chosen // max(1, n_documents))
        if self.share.n_shards is not None:
            fitting = min(n_samples // MIN_SAMPLES_PER_SHARD, n_chosen // 2)
            return max(1, min(self.share.of(self.share.n_shards), fitting))
        return default_shards(n_bytes, n_chosen, n_samples)


def load_given(path: Path) -> TextTokenizer:
    """A tokenizer that batches can use.

    Raises:
        DataError: it cannot be read, or padding is not 0 or end of sequence not 1.
    """
    tokenizer = TextTokenizer.load(path)
    if (tokenizer.pad_id, tokenizer.eos_id) != (0, 1):
        raise DataError(
            f"{path} has padding={tokenizer.pad_id} and end-of-sequence={tokenizer.eos_id}: batches need "
            "ids 0 and 1 (as T5's tokenizers have); train one with --vocab-size instead"
        )
    return tokenizer


def _cut(segments: list[Segment]) -> list[list[Segment]]:
    """Segments in parts of some megabytes."""
    n_bytes = sum(segment.n_bytes for segment in segments)
    size = min(max(_MIN_PART_BYTES, n_bytes // _MAX_PARTS), _MAX_PART_BYTES)
    parts: list[list[Segment]] = []
    n_bytes = size
    for segment in segments:
        # After a compressed file that fills several parts, a new one begins: see _group.
        is_next_file = parts and parts[-1][-1].number and not segment.number
        if n_bytes >= size or (is_next_file and parts[-1][-1].input.is_compressed):
            parts.append([])
            n_bytes = 0
        parts[-1].append(segment)
        n_bytes += segment.n_bytes
    return parts


def _number(parts: list[Part], shuffle: Shuffle | None) -> list[Part]:
    before = accumulate((part.n_documents for part in parts), initial=0)
    return [
        replace(part, first_document=first, shuffle=shuffle)
        for part, first in zip(parts, before, strict=False)
    ]


def _group(parts: list[Part]) -> list[tuple[Part, ...]]:
    """Parts that one process should read one after the other: those of one compressed file."""
    groups: list[tuple[Part, ...]] = []
    for part in parts:
        first = part.segments[0]
        # The middle of a compressed file is reached fastest by the process that read what comes before.
        if groups and first.input.is_compressed and first.number:
            groups[-1] = (*groups[-1], part)
        else:
            groups.append((part,))
    return groups


def _texts(parts: list[Part], first_place: int, end_place: int) -> Iterator[str]:
    """The texts of the documents in a range of places: a random sample, since places are shuffled."""
    reader = DocumentReader()
    for part in parts:
        chosen = (part.places() >= first_place) & (part.places() < end_place)
        for is_chosen, document in zip(chosen, part.documents(reader), strict=True):
            if is_chosen:
                yield from document


def _scan_task(task: tuple[int, Input]) -> tuple[int, Scan]:
    return task[0], scan(task[1])


@lru_cache(maxsize=1)
def _load_tokenizer(path: Path, sha256: str) -> TextTokenizer:
    """Loaded once a process; the digest tells one tokenizer from the next at the same path."""
    del sha256
    return TextTokenizer.load(path)


def _tokenise_task(parts: tuple[Part, ...], tokenizer_path: Path, sha256: str, dtype: str) -> int:
    return tokenise_parts(parts, _load_tokenizer(tokenizer_path, sha256), dtype)


def _shard_task(
    task: ShardTask, kind: Kind, tokenizer_path: Path, sha256: str, dtype: str
) -> tuple[str, ShardInfo]:
    return task.file, build_shard(task, kind, dtype, _load_tokenizer(tokenizer_path, sha256))
