"""The AEAD envelope of stubs, and the key file."""

from __future__ import annotations

import base64
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.stub.keyring import OVERHEAD, Keyring, SealError, generate

OLD, NEW = {b"old.": b"o" * 32}, {b"new.": b"n" * 32}
PLACE = b"ike:stub:{192.0.2.1/ab}:ab00000000000001"


@given(st.binary(max_size=500), st.binary(max_size=60))
def test_what_was_sealed_opens_in_its_place(plaintext: bytes, place: bytes) -> None:
    ring = Keyring(OLD)
    sealed = ring.seal(plaintext, place)
    assert len(sealed) == len(plaintext) + OVERHEAD
    assert ring.open(sealed, place) == plaintext


def test_what_was_sealed_does_not_open_in_another_place() -> None:
    ring = Keyring(OLD)
    with pytest.raises(SealError, match="moved to another index"):
        ring.open(ring.seal(b"stub", PLACE), PLACE[:-1] + b"2")


@given(st.data())
def test_one_altered_bit_keeps_it_from_opening(data: st.DataObject) -> None:
    ring = Keyring(OLD)
    sealed = bytearray(ring.seal(b"a stub of some octets", PLACE))
    position = data.draw(st.integers(0, len(sealed) - 1))
    sealed[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SealError):
        ring.open(bytes(sealed), PLACE)


@given(st.binary(max_size=200))
def test_arbitrary_octets_raise_nothing_but_seal_error(octets: bytes) -> None:
    for candidate in (octets, b"old." + octets):
        with pytest.raises(SealError):
            Keyring(OLD).open(candidate, PLACE)


def test_what_an_unknown_key_sealed_is_refused_by_the_keys_id() -> None:
    with pytest.raises(SealError, match=b"new.".hex()):
        Keyring(OLD).open(Keyring(NEW).seal(b"stub", PLACE), PLACE)


def test_the_first_key_seals_and_every_key_opens() -> None:
    both = Keyring({**NEW, **OLD})
    assert both.seal(b"stub", PLACE).startswith(b"new.")
    assert both.open(Keyring(OLD).seal(b"stub", PLACE), PLACE) == b"stub"


def test_no_two_seals_are_the_same() -> None:
    ring = Keyring(OLD)
    assert ring.seal(b"stub", PLACE) != ring.seal(b"stub", PLACE)


def test_a_keyring_never_shows_its_keys() -> None:
    shown = repr(Keyring(OLD))
    assert b"old.".hex() in shown
    assert "oooo" not in shown


# the key file


def test_a_generated_key_file_is_private_and_loads(tmp_path: Path) -> None:
    path = tmp_path / "bank.key"
    key_id = generate(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Keyring.load(path).seal(b"", b"")[:4].hex() == key_id


def test_generating_never_replaces_a_key_file(tmp_path: Path) -> None:
    path = tmp_path / "bank.key"
    generate(path)
    before = path.read_bytes()
    with pytest.raises(SealError, match="exists"):
        generate(path)
    assert path.read_bytes() == before


def test_an_added_key_seals_while_the_old_one_still_opens(tmp_path: Path) -> None:
    path = tmp_path / "bank.key"
    generate(path)
    sealed = Keyring.load(path).seal(b"stub", PLACE)
    key_id = generate(path, add=True)
    ring = Keyring.load(path)
    assert ring.seal(b"", b"")[:4].hex() == key_id
    assert ring.open(sealed, PLACE) == b"stub"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["bank.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_file_open_to_others_is_refused_with_the_fix(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "bank.key"
    generate(path)
    path.chmod(mode)
    with pytest.raises(SealError, match=f"chmod 600 {path}"):
        Keyring.load(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_a_key_file_of_another_user_is_refused_with_the_fix(tmp_path: Path) -> None:
    path = tmp_path / "bank.key"
    generate(path)
    os.chown(path, 65534, 0)
    with pytest.raises(SealError, match=f"chown root {path}"):
        Keyring.load(path)


def test_a_missing_key_file_is_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(SealError, match="ike-sa-sync keygen"):
        Keyring.load(tmp_path / "bank.key")


SECRET = base64.b64encode(b"k" * 32).decode()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        (f"00000001 {SECRET}\n00000001 {SECRET}\n", "line 2: key id 00000001 is there twice"),
        (f"00000001 {SECRET[:-4]}\n", "line 1: not a key"),
        (f"1 {SECRET}\n", "line 1: not a key"),
        (f"# comment\n\n00000001 {SECRET} more\n", "line 3: not a key"),
    ],
)
def test_a_spoilt_key_file_is_refused_by_its_line(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "bank.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(SealError, match=reason) as caught:
        Keyring.load(path)
    assert SECRET[:8] not in str(caught.value)


@given(st.binary(max_size=200))
def test_an_arbitrary_key_file_raises_nothing_but_seal_error(octets: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(octets)
        file.flush()
        with pytest.raises(SealError):
            Keyring.load(file.name)
