"""The four stages of a preparation: read, tokenizer, tokenise, write shards; see `prepare`."""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dist_transformer.data.documents import Input, Scan, Segment, read_documents, scan
from dist_transformer.data.folder import WORK_NAME, Recipe, claim_folder
from dist_transformer.data.hashing import Shuffle
from dist_transformer.data.manifest import DTYPES, TOKENIZER_NAME, Kind, Manifest, ShardInfo, sha256_of
from dist_transformer.data.order import LANE_COUNTS
from dist_transformer.data.pool import count_with, progress, run_tasks
from dist_transformer.data.spill import Part, ShardTask, build_shard, part_totals, tokenise_parts
from dist_transformer.data.tokenizer import TextTokenizer, check_vocab_size
from dist_transformer.errors import DataError

TOKENIZER_TEXT_BYTES = 100 << 20
"""At most about so much text trains the tokenizer: a random part of the training documents where there is
more.
"""
SHARD_BYTES = 64 << 20
"""Size of a shard's tokens that the default number of shards aims at."""
MIN_SHARDS, ENOUGH_SHARDS, MIN_SAMPLES_PER_SHARD = 24, 96, 8
MAX_HELD_OUT = 2000
_SHUFFLE_KEY = 0x5EED
_MIN_PART_BYTES, _MAX_PARTS = 8 << 20, 512
_PARALLEL_BYTES = 4 << 20
"""Less text than this is not worth starting processes for."""


@dataclass(frozen=True)
class PreparedSummary:
    """What a preparation wrote, for the person who ran it."""

    out: Path
    kind: Kind
    n_samples: int
    """Training samples."""
    n_eval_samples: int
    n_shards: int
    """Training shards."""
    n_source_tokens: int
    """Training tokens of sources or documents, without EOS."""
    n_target_tokens: int
    n_empty: int
    """Documents or pairs left out because they, or one side, are empty."""
    n_split: int
    """Documents longer than max_document_tokens, written as several samples."""
    vocab_size: int
    """What the tokenizer has; little text can give fewer ids than were asked for."""
    seconds: float


class Preparation:
    """One run of the four stages."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        inputs: list[Input],
        held: list[Input],
        tokenizer: str | Path | None,
        workers: int | None,
        overwrite: bool,
    ) -> None:
        self.recipe, self.out, self.inputs, self.held = recipe, out, inputs, held
        self.given_tokenizer = None if tokenizer is None else _load_given(Path(tokenizer))
        self.n_workers = workers or len(os.sched_getaffinity(0))
        self.overwrite = overwrite
        self.work = out / WORK_NAME
        recipe.check()
        if self.given_tokenizer is None:
            check_vocab_size(recipe.vocab_size)
        _check_inputs(inputs, held)

    def run(self) -> PreparedSummary:
        """Do what is left to do.

        Raises:
            DataError: bad input or an output folder that is not ours to write.
        """
        started = time.monotonic()
        train, held = self._scan()
        n_documents = sum(segment.n_documents for found in train for segment in found.segments)
        n_held_out = self._count_held_out(n_documents, held)
        n_train = n_documents - n_held_out
        if self.recipe.n_shards is not None and self.recipe.n_shards > n_train:
            raise DataError(
                f"{self.recipe.n_shards} shards are more than the {n_train} training documents: use "
                f"--shards {n_train} or fewer"
            )
        digest = self.given_tokenizer.sha256 if self.given_tokenizer else None
        claim_folder(self.out, self.recipe.describe([*train, *held], len(held), digest), self.overwrite)
        self.work.mkdir(parents=True, exist_ok=True)
        shuffle = Shuffle(n_documents, self.recipe.seed, _SHUFFLE_KEY)
        parts = self._build_parts("train", [s for found in train for s in found.segments], shuffle)
        held_parts = self._build_parts("eval", [s for found in held for s in found.segments], None)
        tokenizer = self._make_tokenizer(parts, n_held_out)
        dtype = "u16" if tokenizer.vocab_size <= 1 << 16 else "u32"
        self._tokenise([*parts, *held_parts], tokenizer, dtype)
        manifest = self._write_shards(parts, held_parts, n_held_out, n_documents, tokenizer, dtype)
        n_empty = sum(found.n_empty for found in (*train, *held))
        n_split = sum(part_totals(part)["n_split"] for part in (*parts, *held_parts))
        manifest = replace(manifest, counts={"n_empty": n_empty, "n_split": n_split})
        manifest.save()
        shutil.rmtree(self.work, ignore_errors=True)
        return PreparedSummary(
            out=self.out,
            kind=manifest.kind,
            n_samples=sum(shard.n_samples for shard in manifest.train),
            n_eval_samples=sum(shard.n_samples for shard in manifest.eval),
            n_shards=len(manifest.train),
            n_source_tokens=sum(shard.n_source_tokens for shard in manifest.train),
            n_target_tokens=sum(shard.n_target_tokens for shard in manifest.train),
            n_empty=n_empty,
            n_split=n_split,
            vocab_size=manifest.vocab_size,
            seconds=time.monotonic() - started,
        )

    def _scan(self) -> tuple[list[Scan], list[Scan]]:
        """Read every input once; nothing is written before all of them are known to be good."""
        inputs = [*self.inputs, *self.held]
        sizes = [sum(Path(name).stat().st_size for name in source.files) for source in inputs]
        self._n_bytes = sum(sizes)
        if self._n_bytes < _PARALLEL_BYTES:
            self.n_workers = 1
        tasks = list(enumerate(inputs))
        with progress("reading", self._n_bytes) as advance:
            finished = run_tasks(_scan_task, tasks, self.n_workers)
            scans = dict(count_with(finished, advance, lambda found: sizes[found[0]]))
        train = [scans[i] for i in range(len(self.inputs))]
        held = [scans[i] for i in range(len(self.inputs), len(inputs))]
        for group, name in ((train, self.inputs), (held, self.held)):
            if name and not any(segment.n_documents for found in group for segment in found.segments):
                raise DataError(
                    f"there is no text in {', '.join(f for source in name for f in source.files)}"
                )
        return train, held

    def _count_held_out(self, n_documents: int, held: list[Scan]) -> int:
        if held:
            if self.recipe.held_out:
                raise DataError("held_out and files of held-out text exclude each other: give one of the two")
            return 0
        wanted = self.recipe.held_out
        if wanted is None:
            return 0 if n_documents < 2 else max(1, min(n_documents // 100, MAX_HELD_OUT))
        if wanted >= n_documents:
            raise DataError(
                f"held_out={wanted} leaves nothing to train on: there are {n_documents} documents"
            )
        return wanted

    def _build_parts(self, group: str, segments: list[Segment], shuffle: Shuffle | None) -> list[Part]:
        size = max(_MIN_PART_BYTES, sum(segment.n_bytes for segment in segments) // _MAX_PARTS)
        grouped: list[list[Segment]] = []
        n_bytes = size
        for segment in segments:
            if n_bytes >= size:
                grouped.append([])
                n_bytes = 0
            grouped[-1].append(segment)
            n_bytes += segment.n_bytes
        parts, first = [], 0
        for number, members in enumerate(grouped):
            name = f"{group}-part-{number:05d}"
            longest = self.recipe.max_document_tokens
            parts.append(Part(self.work, name, tuple(members), first, shuffle, longest))
            first += parts[-1].n_documents
        return parts

    def _make_tokenizer(self, parts: list[Part], n_held_out: int) -> TextTokenizer:
        path = self.out / TOKENIZER_NAME
        if not path.exists():
            if self.given_tokenizer is not None:
                tokenizer = self.given_tokenizer
            else:
                n_bytes = sum(segment.n_bytes for part in parts for segment in part.segments)
                n_documents = sum(part.n_documents for part in parts)
                share = min(1.0, TOKENIZER_TEXT_BYTES / max(n_bytes, 1))
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
        tasks: list[tuple[Part, ...]] = []
        for part in parts:
            first = part.segments[0]
            # The middle of a compressed file is reached fastest by the process that read what comes before.
            if tasks and first.input.is_compressed and any(first.offsets):
                tasks[-1] = (*tasks[-1], part)
            else:
                tasks.append((part,))
        n_bytes = sum(segment.n_bytes for part in parts for segment in part.segments)
        function = partial(_tokenise_task, tokenizer_path=self.out / TOKENIZER_NAME, dtype=dtype)
        with progress("tokenising", n_bytes) as advance:
            for amount in run_tasks(function, tasks, self.n_workers):
                advance(amount)

    def _write_shards(
        self,
        parts: list[Part],
        held_parts: list[Part],
        n_held_out: int,
        n_documents: int,
        tokenizer: TextTokenizer,
        dtype: str,
    ) -> Manifest:
        itemsize = DTYPES[dtype].itemsize
        n_tokens = sum(part_totals(part)["n_tokens"] for part in parts)
        n_bytes = itemsize * n_tokens
        n_train = n_documents - n_held_out
        longest = self.recipe.max_document_tokens or n_tokens
        n_samples = max(n_train, n_tokens // max(1, longest) * n_train // max(1, n_documents))
        n_shards = self.recipe.n_shards or default_shards(n_bytes, n_train, n_samples)
        tasks = [
            (task, tuple(parts)) for task in self._shard_tasks("train", n_shards, n_held_out, n_documents)
        ]
        n_held = sum(part.n_documents for part in held_parts) or n_held_out
        if n_held:
            n_eval_bytes = n_bytes * n_held_out // n_documents
            if held_parts:
                n_eval_bytes = itemsize * sum(part_totals(part)["n_tokens"] for part in held_parts)
            n_eval_shards = min(n_held, 1 + n_eval_bytes // SHARD_BYTES)
            eval_tasks = self._shard_tasks("eval", n_eval_shards, 0, n_held)
            tasks += [(task, tuple(held_parts or parts)) for task in eval_tasks]
        function = partial(_shard_task, kind=self.recipe.kind, dtype=dtype)
        with progress("writing shards", len(tasks)) as advance:
            finished = dict(count_with(run_tasks(function, tasks, self.n_workers), advance, lambda _: 1))
        shards = [finished[task.file] for task, _ in tasks]
        return Manifest(
            root=self.out,
            kind=self.recipe.kind,
            train=tuple(shards[:n_shards]),
            eval=tuple(shards[n_shards:]),
            tokenizer_sha256=sha256_of(self.out / TOKENIZER_NAME),
            vocab_size=tokenizer.vocab_size,
            token_dtype=dtype,
        )

    def _shard_tasks(self, split: str, n_shards: int, first: int, end: int) -> list[ShardTask]:
        bounds = [first + (end - first) * i // n_shards for i in range(n_shards + 1)]
        return [
            ShardTask(
                self.out, self.work, "train" if split == "train" else "eval", i, bounds[i], bounds[i + 1]
            )
            for i in range(n_shards)
        ]


def default_shards(n_bytes: int, n_documents: int, n_samples: int) -> int:
    """A number of shards with many divisors: about 64 MB each, at least 24, and 96 where there are samples for it.

    At least 8 samples in each; of a few long documents (books) that are split, 2 are enough for a shard.
    """
    # 96 serve 16 GPUs with 2 loader workers each; shards of under 1,000 samples would pack less well.
    by_samples = min(ENOUGH_SHARDS, n_samples // 1000)
    wanted = max(MIN_SHARDS, by_samples, -(-n_bytes // SHARD_BYTES))
    fitting = [
        count
        for count in LANE_COUNTS
        if count == 1 or (count * MIN_SAMPLES_PER_SHARD <= n_samples and count * 2 <= n_documents)
    ]
    return next((count for count in fitting if count >= wanted), fitting[-1])


def _check_inputs(inputs: list[Input], held: list[Input]) -> None:
    """Refuse missing files and files given twice, before anything is read."""
    seen: set[Path] = set()
    if not inputs:
        raise DataError("no input files were given")
    for source in (*inputs, *held):
        for name in source.files:
            path = Path(name)
            if not path.is_file():
                raise DataError(
                    f"{name} {'is a folder' if path.is_dir() else 'does not exist'}: give a text file"
                )
            if (resolved := path.resolve()) in seen:
                raise DataError(f"{name} was given twice: its text would count double; name it once")
            seen.add(resolved)


def _load_given(path: Path) -> TextTokenizer:
    tokenizer = TextTokenizer.load(path)
    if (tokenizer.pad_id, tokenizer.eos_id) != (0, 1):
        raise DataError(
            f"{path} has padding={tokenizer.pad_id} and end-of-sequence={tokenizer.eos_id}: batches need "
            "ids 0 and 1 (as T5's "
            "tokenizers have); train one with --vocab-size instead"
        )
    return tokenizer


def _texts(parts: list[Part], first_place: int, end_place: int) -> Iterator[str]:
    """The texts of the documents in a range of places: a random sample, since places are shuffled."""
    for part in parts:
        chosen = (part.places() >= first_place) & (part.places() < end_place)
        for is_chosen, document in zip(chosen, read_documents(part.segments), strict=True):
            if is_chosen:
                yield from document


def _scan_task(task: tuple[int, Input]) -> tuple[int, Scan]:
    return task[0], scan(task[1])


def _tokenise_task(parts: tuple[Part, ...], tokenizer_path: Path, dtype: str) -> int:
    return tokenise_parts(parts, TextTokenizer.load(tokenizer_path), dtype)


def _shard_task(task: tuple[ShardTask, tuple[Part, ...]], kind: Kind, dtype: str) -> tuple[str, ShardInfo]:
    return task[0].file, build_shard(task[0], task[1], kind, dtype)
