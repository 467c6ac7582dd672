"""Documents of inputs: every format and packing gives the same ones, from any segment on; bad input is one sentence."""

import gzip
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_transformer.data import documents
from dist_transformer.data.compressed import open_unpacked
from dist_transformer.data.documents import DocumentReader, read_documents, scan
from dist_transformer.data.inputs import Input, Reading
from dist_transformer.errors import DataError

TEXT = Reading("line", "error", "error", ("text",))


def read_all(source: Input) -> list[tuple[str, ...]]:
    return list(read_documents(scan(source).segments))


def write_packed(path: Path, content: bytes) -> None:
    """As the suffix says; Zstandard in two frames and an empty one, gzip in two members."""
    half = len(content) // 2
    pieces = [content[:half], b"", content[half:]]
    if path.suffix == ".gz":
        path.write_bytes(b"".join(map(gzip.compress, pieces)))
    elif path.suffix == ".zst":
        path.write_bytes(b"".join(map(zstandard.ZstdCompressor(write_checksum=True).compress, pieces)))
    else:
        path.write_bytes(content)


LINES = st.lists(st.text(st.sampled_from("ab é\u3000\t\r☃"), max_size=12), max_size=30)


@settings(max_examples=40, deadline=None)
@given(lines=LINES, ends=st.booleans(), size=st.integers(1, 60), unit=st.sampled_from(["line", "paragraph"]))
def test_segments_are_the_documents(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], ends: bool, size: int, unit: Any
) -> None:
    """Cut anywhere, read in any order, packed or not: what a few lines of Python find."""
    content = "\n".join(lines) + "\n" * ends
    expected = []
    blocks = content.split("\n") if unit == "line" else split_paragraphs(content)
    for block in blocks:
        text = block.replace("\r\n", "\n").rstrip("\r\n")
        if text.strip():
            expected.append((text,))
    folder = tmp_path_factory.mktemp("documents")
    for name in ("a.txt", "a.txt.zst"):
        write_packed(folder / name, content.encode())
        source = Input((str(folder / name),), Reading(unit, "error", "error", ("text",)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents, "SEGMENT_BYTES", size)
            found = scan(source)
        assert list(read_documents(found.segments)) == expected
        alone = [list(DocumentReader().read(segment)) for segment in reversed(found.segments)]
        assert list(chain.from_iterable(reversed(alone))) == expected
        assert sum(segment.n_documents for segment in found.segments) == len(expected)
        assert sum(segment.n_raw for segment in found.segments) == len(expected) + found.n_empty
        assert found.sizes == ((folder / name).stat().st_size,)


def split_paragraphs(content: str) -> list[str]:
    held: list[str] = []
    found = []
    for line in content.split("\n"):
        # Of bytes, only ASCII space is space: a line of U+3000 does not end a paragraph.
        if line.encode().strip():
            held.append(f"{line}\n")
        else:
            found.append("".join(held))
            held = []
    return [*found, "".join(held)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_formats_agree(tmp_path: Path, suffix: str) -> None:
    pairs = [(f"source {i} é", f"target {i}") for i in range(200)]
    contents = {
        "s.txt": "".join(f"{s}\n" for s, _ in pairs),
        "t.txt": "".join(f"{t}\n" for _, t in pairs),
        "p.tsv": "".join(f"{s}\t{t}\n" for s, t in pairs),
        "p.jsonl": "".join(json.dumps({"in": {"x": s}, "out.y": t, "n": 1}) + "\n" for s, t in pairs),
    }
    for name, content in contents.items():
        write_packed(tmp_path / (name + suffix), content.encode())
    paths = {name: str(tmp_path / (name + suffix)) for name in contents}
    both = Reading("line", "error", "error", ("in.x", "out.y"))
    for files in ((paths["s.txt"], paths["t.txt"]), (paths["p.tsv"],), (paths["p.jsonl"],)):
        assert read_all(Input(files, both)) == pairs
    one = Reading("line", "error", "error", ("in.x",))
    assert read_all(Input((paths["p.jsonl"],), one)) == [(s,) for s, _ in pairs]
    assert read_all(Input((paths["s.txt"],), TEXT)) == [(s,) for s, _ in pairs]
    assert read_all(Input((paths["p.tsv"],), TEXT)) == [(f"{s}\t{t}",) for s, t in pairs]


def test_a_json_text_keeps_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson"
    rows = [{"text": "one\r\ntwo\n"}, {"text": " \n"}, {"text": "☃ \ud83d\ude00"}]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode() + b"\n\n")
    found = scan(Input((str(path),), TEXT))
    assert list(read_documents(found.segments)) == [("one\ntwo",), ("☃ 😀",)]
    assert (found.n_empty, found.n_bad_lines) == (2, 0)


BAD_LINES = {
    '{"text": "a"': r"not a JSON object on one line \(Expecting ',' delimiter, column 13\)",
    "plain text": r"not a JSON object on one line \(Expecting value, column 1\)",
    '["a", "b"]': "a list where one JSON object a line is expected",
    "17": "a number where one JSON object a line is expected",
    '{"body": "a", "id": 3}': r"no field 'text' \(there are 'body', 'id'\)",
    "{}": r"no field 'text' \(there are none\)",
    '{"text": null}': "field 'text' is null, not a string",
    '{"text": {"a": "b"}}': "field 'text' is an object, not a string",
    '{"text": 1.5}': "field 'text' is a number, not a string",
    '{"text": "half \\ud83d"}': r"half of a surrogate pair \(.*\), which --bad-utf8 replace replaces",
    "[" * 100_000: "JSON that is nested too deeply",
    '{"text": ' + "1" * 5000 + "}": r"JSON that cannot be read \(.*\)",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:12])
def test_bad_json_lines(tmp_path: Path, line: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "good"}\n' + line + '\n{"text": "also"}\n')
    with pytest.raises(DataError, match=rf"in.jsonl, line 2: {BAD_LINES[line]}: mend .* --bad-lines skip"):
        scan(Input((str(path),), TEXT))
    skipping = Input((str(path),), Reading("line", "error", "skip", ("text",)))
    assert read_all(skipping) == [("good",), ("also",)]
    assert scan(skipping).n_bad_lines == 1


def test_a_field_below_what_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"translation": {"en": "a"}}\n{"translation": "b"}\n')
    reading = Reading("line", "error", "error", ("translation.en",))
    with pytest.raises(DataError, match=r"line 2: no field 'translation\.en'"):
        scan(Input((str(path),), reading))


def test_bad_columns(tmp_path: Path) -> None:
    path = tmp_path / "in.tsv"
    path.write_text("a\tb\n\nonly one\na\tb\tc\nc\td\n")
    fields = ("source", "target")
    with pytest.raises(DataError, match=r"in.tsv, line 3: 1 columns where source, tab, target are expected"):
        scan(Input((str(path),), Reading("line", "error", "error", fields)))
    skipping = Input((str(path),), Reading("line", "error", "skip", fields))
    assert read_all(skipping) == [("a", "b"), ("c", "d")]
    found = scan(skipping)
    assert (found.n_empty, found.n_bad_lines) == (1, 2)


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl", "in.tsv", "in.txt.gz", "in.jsonl.zst"])
def test_bad_bytes_in_every_format(tmp_path: Path, name: str) -> None:
    line = {"jsonl": b'{"source": "bad \xfc", "target": "b"}\n', "tsv": b"bad \xfc\tb\n"}
    content = line.get(name.split(".")[1], b"bad \xfc\n")
    good = content.replace(b"\xfc", b"u")
    write_packed(tmp_path / name, good * 2 + content)
    fields = ("source",) if "txt" in name else ("source", "target")
    place = 2 * len(good) + content.index(b"\xfc")
    with pytest.raises(DataError, match=rf"{name}, line 3, byte {place}: not UTF-8 \(byte 0xfc\)"):
        scan(Input((str(tmp_path / name),), Reading("line", "error", "error", fields)))
    source = Input((str(tmp_path / name),), Reading("line", "replace", "error", fields))
    assert [document[0] for document in read_all(source)] == ["bad u", "bad u", "bad \ufffd"]


def test_half_of_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a \\ud83d b"}\n')
    assert read_all(Input((str(path),), Reading("line", "replace", "error", ("text",)))) == [("a \ufffd b",)]


@pytest.mark.parametrize("name", ["in.txt.gz", "in.txt.zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "not packed"])
def test_damaged_archives(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    write_packed(path, b"".join(b"line %d\n" % i for i in range(5000)))
    content = path.read_bytes()
    middle = len(content) // 4
    path.write_bytes(
        {
            "cut": content[:-20],
            "flipped": content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :],
            "not packed": b"plain text\n",
        }[damage]
    )
    kind = "gzip" if name.endswith("gz") else "Zstandard"
    with pytest.raises(DataError, match=rf"{name} is a damaged {kind} file \(.*\): copy it again"):
        scan(Input((str(path),), TEXT))


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("one\ntwo\nthree\n")
    found = scan(Input((str(path),), TEXT))
    path.write_text("one\n\nthree\n")
    with pytest.raises(DataError, match=r"in.txt was changed while it was prepared"):
        list(read_documents(found.segments))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_from_any_byte_on(tmp_path: Path, name: str) -> None:
    content = bytes(range(256)) * 20_000
    write_packed(tmp_path / name, content)
    for skip in (0, 1, 3_000_000, len(content), len(content) + 5):
        with open_unpacked(str(tmp_path / name), skip=skip) as file:
            assert file.read() == content[skip:]
