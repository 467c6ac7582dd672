"""Tars by their headers: what `tarfile` and GNU tar write is read, and nothing a header claims is believed."""

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_transformer.data.tar import TarDamageError, TarReader


def members_of(path: Path) -> list[tuple[str, bytes]]:
    with path.open("rb", buffering=0) as file:
        reader = TarReader(file)
        found = []
        while (member := reader.next()) is not None:
            found.append((member.name, reader.read(member)))
        assert reader.has_end
    return found


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: Any) -> None:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


NAMES = [
    "a.txt",
    "x" * 99,
    "x" * 100,
    "long/" * 30 + "name.txt",
    "y" * 300,
    "zwölf/Boxkämpfer.txt",
    "./here.txt",
]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_python(tmp_path: Path, form: int) -> None:
    names = [name for name in NAMES if len(name) < 200 or form != tarfile.USTAR_FORMAT]
    members = [(name, os.urandom(3 * i * 200)) for i, name in enumerate(names)]
    write_tar(tmp_path / "x.tar", members, format=form)
    assert members_of(tmp_path / "x.tar") == members


@pytest.mark.parametrize("form", ["v7", "ustar", "gnu", "posix"])
def test_every_form_of_gnu_tar(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.txt", "sub/b.txt", "n" * 90 + ".txt"):
        (folder / name).write_bytes(os.urandom(700))
    (folder / "link").symlink_to("a.txt")
    os.link(folder / "a.txt", folder / "zz.txt")
    command = shutil.which("tar")
    assert command is not None
    subprocess.run([command, f"--format={form}", "-cf", tmp_path / "x.tar", "-C", folder, "."], check=True)
    with tarfile.open(tmp_path / "x.tar") as tar:
        expected = {m.name: tar.extractfile(m).read() for m in tar if m.isreg()}  # type: ignore[union-attr]
    assert {name.removeprefix("./"): content for name, content in members_of(tmp_path / "x.tar")} == {
        name.removeprefix("./"): content for name, content in expected.items()
    }


def test_starting_at_a_member(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [(name, b"12") for name in NAMES], format=tarfile.PAX_FORMAT)
    with (tmp_path / "x.tar").open("rb") as file:
        reader = TarReader(file)
        places = []
        while (member := reader.next()) is not None:
            places.append(member)
        for member in reversed(places):
            reader.seek(member.header)
            reader.release()
            assert reader.next() == member


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 200_000), max_size=6), cut=st.floats(0, 1))
def test_a_cut_tar_gives_its_whole_members(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], cut: float
) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.tar"
    members = [(f"{i}.txt", os.urandom(size)) for i, size in enumerate(sizes)]
    write_tar(path, members)
    content = path.read_bytes()[: int(cut * path.stat().st_size)]
    path.write_bytes(content)
    found, has_end, is_damaged = [], False, False
    with path.open("rb") as file:
        reader = TarReader(file)
        try:
            while (member := reader.next()) is not None:
                found.append((member.name, reader.read(member)))
            has_end = reader.has_end
        except TarDamageError:
            is_damaged = True
    assert found == members[: len(found)]
    data_end = sum(512 + -(-size // 512) * 512 for size in sizes)
    assert len(found) == len(members) if len(content) >= data_end else len(found) <= len(members)
    assert has_end == (len(content) >= data_end + 512)
    assert is_damaged or has_end or len(content) % 512 == 0 or len(content) < data_end


def header(name: bytes = b"a.txt", size: bytes = b"00000000005\0", kind: bytes = b"0") -> bytearray:
    made = bytearray(512)
    made[: len(name)] = name
    made[124 : 124 + len(size)] = size
    made[148:156] = b" " * 8
    made[156:157] = kind
    made[257:263] = b"ustar\0"
    made[148:156] = b"%06o\0 " % sum(made)
    return made


HOSTILE = [
    (header(size=b"77777777777\0"), "inside a member"),
    (header(size=b"\x80" + bytes(3) + b"\xff" * 8), "inside a member"),
    (header(size=b"\xff" * 12), "negative number"),
    (header(size=b"-0000000001\0"), "negative number"),
    (header(size=b"hello world\0"), "no number where one belongs"),
    (header(kind=b"L", size=b"00010000001\0"), "extended header of 2097153 bytes .* is refused"),
    (header(kind=b"x", size=b"00000000005\0") + b"99 path=x\n".ljust(512, b"\0"), "pax header is malformed"),
    (header(kind=b"x", size=b"00000000005\0") + b"hello".ljust(512, b"\0"), "pax header is malformed"),
    (
        header(kind=b"x", size=b"00000000016\0") + b"14 size=-1234\n".ljust(512, b"\0"),
        "pax header is malformed",
    ),
    (
        header(kind=b"x", size=b"00000000024\0") + b"20 size=99999999999\n".ljust(512, b"\0") + header(),
        "inside a member",
    ),
    (b"\x1f\x8b\x08\0" + os.urandom(600), "it is compressed: decompress it"),
    (b"\x28\xb5\x2f\xfd" + os.urandom(600), "it is compressed: decompress it"),
    (b"<html>" + b" " * 600, "byte 0 begins no tar header"),
    (header()[:100], "inside a header"),
]


@pytest.mark.parametrize(("content", "sentence"), HOSTILE)
def test_hostile_headers(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(content))
    if b"L" in content[156:157]:
        os.truncate(path, 4 * 2**20)
    with path.open("rb") as file, pytest.raises(TarDamageError, match=sentence):
        reader = TarReader(file)
        while reader.next() is not None:
            pass


def test_any_flipped_bit_of_a_header_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for bit in range(0, 512 * 8, 37):
        made = header()
        made[bit // 8] ^= 1 << bit % 8
        path.write_bytes(made + bytes(512))
        with path.open("rb") as file:
            try:
                member = TarReader(file).next()
            except TarDamageError:
                continue
            # The spaces and zeros around the checksum's digits mean nothing.
            assert 148 <= bit // 8 < 156 and member is not None and member.name == "a.txt"
