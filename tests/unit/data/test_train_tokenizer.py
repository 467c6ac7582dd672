"""A tokenizer trained alone: on everything where that is little, else on pieces from all over the inputs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from dist_transformer.data import compressed
from dist_transformer.data import train_tokenizer as module
from dist_transformer.data.inputs import Input, Reading
from dist_transformer.data.prepare import prepare_text
from dist_transformer.data.tokenizer import TextTokenizer
from dist_transformer.data.train_tokenizer import train_tokenizer
from dist_transformer.errors import DataError
from tests.unit.data.prepared import numbered_lines

READING = Reading("line", "replace", "skip", ("text",))


def test_little_text_is_read_whole(tmp_path: Path) -> None:
    lines = numbered_lines(300)
    (tmp_path / "a.txt").write_text("\n".join(lines[:150]) + "\n")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"t": line}) + "\n" for line in lines[150:]) + "{\n")
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    summary = train_tokenizer(files, tmp_path / "new" / "tokenizer.json", fields=["t"], vocab_size=500)
    assert (summary.vocab_size, summary.n_bad_lines) == (500, 1)
    assert summary.n_bytes == sum(map(len, lines))
    # The same as preparation would train on the same text.
    (tmp_path / "all.txt").write_text("\n".join(lines) + "\n")
    prepare_text([tmp_path / "all.txt"], tmp_path / "out", vocab_size=500, workers=1, held_out=0)
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == (
        tmp_path / "out" / "tokenizer.json"
    ).read_bytes()
    with pytest.raises(DataError, match=r"tokenizer.json is there: use another --out or --overwrite"):
        train_tokenizer(files, tmp_path / "new" / "tokenizer.json", fields=["t"], vocab_size=500)
    train_tokenizer(files, tmp_path / "new" / "tokenizer.json", fields=["t"], vocab_size=400, overwrite=True)
    assert TextTokenizer.load(tmp_path / "new" / "tokenizer.json").vocab_size == 400


@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_much_text_is_sampled(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENIZER_TEXT_BYTES", 20_000)
    monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    monkeypatch.setattr(compressed, "_BUFFER_BYTES", 512)
    monkeypatch.setattr(compressed, "_ZSTD_INPUT_BYTES", 128)
    inputs = []
    for i in range(4):
        content = "".join(f"{i} {n}\n" for n in range(20_000)).encode()
        path = tmp_path / f"{i}.txt{suffix}"
        if suffix:
            # Frames, since the whole of one block is unpacked at once.
            frames = [content[at : at + 2000] for at in range(0, len(content), 2000)]
            content = b"".join(map(zstandard.ZstdCompressor().compress, frames))
        path.write_bytes(content)
        inputs.append(Input((str(path),), READING))
    samples = [list(module._Sample(inputs, seed).texts(lambda _: None)) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]
    for sample in samples:
        assert max(Counter(sample).values()) == 1, "no piece twice"
        assert all(0 <= int(text.split(" ")[1]) < 20_000 for text in sample), "whole lines"
        found = Counter(text[0] for text in sample)
        assert set(found) == set("0123")
        assert sum(len(text) + 1 for text in sample) == pytest.approx(20_000, rel=0.1)
        places = sorted(int(text.split(" ")[1]) for text in sample)
        assert np.histogram(places, 4, (0, 20_000))[0].min() > len(places) // 16, "from all over"


def test_one_piece_in_each_equal_part() -> None:
    chosen = module._choose([100, 100, 1000], 10, 3)
    assert sorted(chosen) == [0, 2]
    places = [share * 100 for share in chosen[0]] + [100 + share * 900 for share in chosen[2]]
    assert [int(place + 1e-6) // 100 for place in places] == list(range(10))


@pytest.mark.parametrize(
    ("files", "options", "sentence"),
    [
        ({"a.jsonl": '{"body": "x"}\n'}, {}, r"a.jsonl, line 1: no field 'text' \(there are 'body'\)"),
        (
            {"a.txt": "\n \n", "b.txt": ""},
            {},
            r"there is no text to train a tokenizer on in .*a.txt and the other files",
        ),
        ({}, {}, "no input files were given"),
        ({"a.txt": "text\n"}, {"vocab_size": 100}, "vocab_size=100 is too small"),
        ({"a.txt": "text\n"}, {"out": "."}, "is a folder: use another --out"),
        ({"a.txt": "text\n"}, {"out": "a.txt/b.json"}, "b.json cannot be written"),
    ],
)
def test_refused(tmp_path: Path, files: dict[str, str], options: dict[str, Any], sentence: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    out = tmp_path / options.pop("out", "tokenizer.json")
    with pytest.raises(DataError, match=sentence):
        train_tokenizer([tmp_path / name for name in files], out, **{"vocab_size": 500, **options})
    assert not (tmp_path / "tokenizer.json").exists()
