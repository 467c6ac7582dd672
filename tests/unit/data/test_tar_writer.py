"""Our tars are byte for byte those of webdataset's own writer."""

import io
import tarfile

import pytest
import webdataset

from dist_transformer.data.tar_writer import TarWriter

SIZES = (0, 1, 511, 512, 513, 4000, 0, 9000)


@pytest.mark.parametrize("n_members", [0, 1, 8, 17, 18, 19, 20, 40])
def test_bytes_are_those_of_webdataset(n_members: int) -> None:
    members = [(f"{i:09d}", bytes([i]) * SIZES[i % len(SIZES)]) for i in range(n_members)]
    theirs, ours = io.BytesIO(), io.BytesIO()
    # A time of 0.0 instead of 0 would cost three more blocks a member.
    with webdataset.TarWriter(theirs, encoder=False, mtime=0, user="", group="", compress=False) as tar:
        for key, content in members:
            tar.write({"__key__": key, "tokens": content})
    writer = TarWriter(ours)
    for key, content in members:
        assert writer.position == len(ours.getvalue())
        writer.write(f"{key}.tokens", content)
    writer.close()
    assert ours.getvalue() == theirs.getvalue()
    ours.seek(0)
    with tarfile.open(fileobj=ours) as read:
        assert read.getnames() == [f"{key}.tokens" for key, _ in members]


def test_names_and_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="does not fit a plain tar header"):
        TarWriter(io.BytesIO()).write("x" * 101, b"")
    with pytest.raises(UnicodeEncodeError):
        TarWriter(io.BytesIO()).write("é", b"")
