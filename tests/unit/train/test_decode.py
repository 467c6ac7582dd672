"""Decoding a run's text: memory, lines, reading."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_transformer.config import build_config
from dist_transformer.errors import ConfigError, DataError
from dist_transformer.generate.text import Generated
from dist_transformer.train import decode


def run_of(objective: str = "pairs") -> Any:
    tree = {"run": {"dir": "x"}, "data": {"train": "x", "objective": objective}, "train": {"steps": 1}}
    return SimpleNamespace(config=build_config(tree), scorer=None, tokenizer=None)


def test_batches_shrink_until_memory_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def write(
        model: object, tokenizer: object, texts: Sequence[str], config: Any, **_: Any
    ) -> list[Generated]:
        asked.append(config.batch_tokens)
        if config.batch_tokens > 1000:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
        return [Generated(text.upper(), 0.0, ()) for text in texts]

    monkeypatch.setattr(decode, "generate_texts", write)
    decoder = decode.LineDecoder(run_of(), {"batch_tokens": 4000})
    for text in ("a", "b"):
        assert decoder([decode.Line(0, text)])[0].outputs[0][0] == text.upper()
    assert asked == [4000, 2000, 1000, 1000], "what did not fit is not tried again"


def test_a_line_stays_a_line_and_cut_sources_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = [Generated("one\ntwo", 0.0, ()), Generated("three", 0.0, (), n_cut=4)]
    monkeypatch.setattr(decode, "generate_texts", lambda *_, **__: outputs)
    assert decode.decode_lines(run_of(), ["a", "b"], {}) == ["one two", "three"]
    assert "1 of 2 inputs" in capsys.readouterr().err


def test_reading_lines(tmp_path: Path) -> None:
    good = tmp_path / "good.txt"
    good.write_bytes("eins\r\n\nzwei ü".encode())
    assert decode.read_lines(str(good)) == ["eins", "", "zwei ü"]
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"eins\n\xff\n")
    with pytest.raises(DataError, match=r"bad\.txt: not UTF-8 at byte 0 of line 2"):
        decode.read_lines(str(bad))
    with pytest.raises(ConfigError, match=r"none\.txt: cannot be read"):
        decode.read_lines(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"objective": "pairs"}, ("generate_texts", None)),
        ({"objective": "span_corruption"}, ("fill_texts", None)),
        ({"objective": "prefix_lm"}, ("continue_texts", None)),
        ({"objective": "ul2"}, ("fill_texts", 3)),
        ({"objective": "ul2", "mode_tokens": False}, ("fill_texts", None)),
        ({"objective": "ul2", "denoisers": [{"mode": "S", "density": 0.25}]}, ("continue_texts", 4)),
        (
            {"train": None, "mixture": [{"train": "x", "objective": "prefix_lm"}, {"train": "y"}]},
            ("continue_texts", None),
        ),
    ],
)
def test_a_model_does_what_it_was_trained_for(
    data: dict[str, Any], expected: tuple[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def recorder(name: str) -> Any:
        def write(*_: object, mode_id: int | None = None, **__: object) -> list[Generated]:
            called.append((name, mode_id))
            return [Generated("done", 0.0, ())]

        return write

    for name in ("generate_texts", "fill_texts", "continue_texts"):
        monkeypatch.setattr(decode, name, recorder(name))
    tree = {"run": {"dir": "x"}, "data": {"train": "x"} | data, "train": {"steps": 1}}
    tokenizer = SimpleNamespace(mode_ids={"R": 3, "S": 4, "X": 5})
    run = SimpleNamespace(config=build_config(tree), scorer=None, tokenizer=tokenizer)
    assert decode.decode_lines(run, ["a"], {}) == ["done"]  # type: ignore[arg-type]
    assert called == [expected]


def test_options_are_checked_before_anything_is_read() -> None:
    for decoding, says in (
        ({"top_p": 0.0}, "generate.top_p"),
        ({"temperature": -1.0}, "generate.temperature"),
        ({"max_extra": 3}, "max_extra belongs to max_ratio"),
    ):
        with pytest.raises(ConfigError, match=says):
            decode.LineDecoder(run_of(), decoding)
    with pytest.raises(ConfigError, match="beam_size is 2"):
        decode.LineDecoder(run_of(), {"beam_size": 2}, n_best=3)
    decode.LineDecoder(run_of(), {"beam_size": 2, "sample": True}, n_best=3)


def test_a_model_that_fills_gaps_takes_no_prefixes() -> None:
    decoder = decode.LineDecoder(run_of("span_corruption"), {})
    with pytest.raises(ConfigError, match="takes no prefixes"):
        decoder([decode.Line(0, "a ___", "b")])
