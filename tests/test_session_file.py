"""The file in which a client keeps its sessions (bridge.client.session_file)."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bank_support import stub_of
from bridge.client.session_file import HEADER, Session, SessionFileError, load, pack, write

SESSIONS = [Session(stub_of(), b"sealed", 2e9), Session(stub_of(), None, 0.0)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "sessions"


def damaged(octets: bytes) -> None:
    """Load a file of these octets."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sessions"
        write(file, octets)
        load(file)


def test_what_was_written_is_read_back(path: Path) -> None:
    write(path, pack(SESSIONS))
    assert load(path) == SESSIONS


def test_without_a_file_there_are_no_sessions(path: Path) -> None:
    assert load(path) == []


def test_nobody_else_can_read_it_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        write(path, pack(SESSIONS))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_it_is_replaced_in_one_step_and_nothing_is_left_beside_it(path: Path) -> None:
    write(path, pack(SESSIONS))
    first = path.stat().st_ino
    write(path, pack(SESSIONS[:1]))
    assert path.stat().st_ino != first
    assert load(path) == SESSIONS[:1]
    assert os.listdir(path.parent) == [path.name]


def test_a_failed_write_leaves_the_old_one_and_nothing_beside_it(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(SessionFileError, match="cannot be written"):
        write(path, pack(SESSIONS))
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_one_that_others_can_read_is_not_trusted(path: Path, mode: int) -> None:
    write(path, pack(SESSIONS))
    path.chmod(mode)
    with pytest.raises(SessionFileError, match=f"mode {mode:04o}"):
        load(path)


def test_one_of_another_user_is_not_trusted(path: Path) -> None:
    write(path, pack(SESSIONS))
    os.chown(path, 65534, 65534)
    with pytest.raises(SessionFileError, match="not a file of this user"):
        load(path)


def test_a_link_is_not_followed(path: Path) -> None:
    write(path, pack(SESSIONS))
    link = path.with_name("link")
    link.symlink_to(path)
    with pytest.raises(SessionFileError, match="cannot be read"):
        load(link)


@given(st.binary(max_size=200))
def test_arbitrary_octets_raise_nothing_but_held_file_error(octets: bytes) -> None:
    for candidate in (octets, HEADER + octets):
        with pytest.raises(SessionFileError):
            damaged(candidate + b"\xc1")


@given(st.data())
def test_a_damaged_file_raises_nothing_but_held_file_error(data: st.DataObject) -> None:
    octets = bytearray(pack(SESSIONS))
    octets = octets[: data.draw(st.integers(0, len(octets) - 1))]
    with pytest.raises(SessionFileError):
        damaged(bytes(octets))


def test_no_key_is_in_what_it_complains(path: Path) -> None:
    write(path, pack(SESSIONS)[:-3])
    with pytest.raises(SessionFileError) as caught:
        load(path)
    assert SESSIONS[0].stub.sk_d.hex() not in str(caught.value)
    assert repr(SESSIONS[0].stub.sk_d) not in str(caught.value)
