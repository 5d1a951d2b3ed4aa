"""Keys of the bank that follow one from the other (bridge.stub.keyring, `keygen --epoch`)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import stat
from pathlib import Path

import pytest

from bridge.stub import keyring
from bridge.stub.keyring import RETAIN_SECONDS, Keyring, SealError, generate

DAY = 86_400
NOW = 1_800_000_000.0
PLACE = b"ike:stub:{192.0.2.1/00}:0000000000000000"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    generate(tmp_path / "bank.key", epoch=DAY, now=NOW)
    return tmp_path / "bank.key"


def keys_in(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if not line.startswith("#")]


def test_the_next_key_is_made_by_hkdf(file: Path) -> None:
    [line] = keys_in(file)
    key_id, key, epoch = line.split()
    assert epoch == f"epoch={int(NOW) // DAY}/{DAY}"
    # RFC 5869: extract with a salt of zeros, then two blocks
    secret = hmac.digest(bytes(32), base64.b64decode(key), "sha256")
    first = hmac.digest(secret, b"ike-sa-sync epoch\x01", hashlib.sha256)
    second = hmac.digest(secret, first + b"ike-sa-sync epoch\x02", hashlib.sha256)
    ring = Keyring.load(file, NOW + DAY)
    assert ring.ids == (second[:4], bytes.fromhex(key_id))
    ring.prefer([second[:4]])
    sealed = ring.seal(b"stub", PLACE)
    assert Keyring({second[:4]: first}).open(sealed, PLACE) == b"stub"


def test_every_gateway_comes_to_the_same_key_by_whatever_way(file: Path) -> None:
    running, started_late = Keyring.load(file, NOW), Keyring.load(file, NOW + 5 * DAY)
    for day in range(1, 6):
        assert running.advance(NOW + day * DAY)
    assert not running.advance(NOW + 5 * DAY)
    assert running.ids[0] == started_late.ids[0]
    assert running.sealing == started_late.sealing


def test_a_key_of_a_later_epoch_opens_nothing_of_an_earlier_one(file: Path) -> None:
    ring = Keyring.load(file, NOW)
    expired = ring.seal(b"stub", PLACE)
    ring.advance(NOW + DAY)
    ring.prefer(ring.ids[:1])
    assert ring.keep(file)
    stolen = Keyring.load(file, NOW + DAY)
    with pytest.raises(SealError):
        stolen.open(expired, PLACE)
    # in memory it is still there, for what clients hold
    assert ring.open(expired, PLACE) == b"stub"
    ring.advance(NOW + DAY + RETAIN_SECONDS)
    with pytest.raises(SealError):
        ring.open(expired, PLACE)


def test_the_file_stays_until_the_new_key_seals_and_keeps_its_other_keys_and_its_mode(file: Path) -> None:
    other = os.urandom(4).hex() + " " + base64.b64encode(os.urandom(32)).decode()
    file.write_text(file.read_text() + other + "\n")
    ring = Keyring.load(file, NOW)
    ring.advance(NOW + 3 * DAY)
    assert not ring.keep(file)
    ring.prefer(ring.ids[:1])
    assert ring.keep(file)
    assert not ring.keep(file)
    first, second = keys_in(file)
    assert first.startswith(ring.sealing.hex())
    assert first.endswith(f" epoch={int(NOW) // DAY + 3}/{DAY}")
    assert second == other
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [entry.name for entry in file.parent.iterdir()] == ["bank.key"]
    assert Keyring.load(file, NOW + 3 * DAY).ids == (ring.sealing, bytes.fromhex(other[:8]))


def test_a_key_that_was_added_takes_over_from_a_chain(file: Path) -> None:
    new = generate(file, add=True, epoch=DAY, now=NOW)
    ring = Keyring.load(file, NOW + DAY)
    assert len(ring.ids) == 4
    assert ring.ids[1].hex() == new
    assert ring.sealing.hex() == new


def test_the_sealing_key_is_never_forgotten(file: Path) -> None:
    ring = Keyring.load(file, NOW)
    sealed = ring.seal(b"stub", PLACE)
    ring.advance(NOW + 30 * DAY)
    ring.advance(NOW + 60 * DAY)
    assert ring.open(sealed, PLACE) == b"stub"
    ring.seal(b"stub", PLACE)


def test_a_clock_that_goes_back_takes_no_key_away(file: Path) -> None:
    ring = Keyring.load(file, NOW + DAY)
    assert not ring.advance(NOW)
    assert len(ring.ids) == 2


@pytest.mark.parametrize("epoch", ["epoch=1/60", "epoch=x/86400", "epoch=1", "epoch=1/0"])
def test_an_epoch_that_is_none_is_refused(file: Path, epoch: str) -> None:
    file.write_text(keys_in(file)[0].partition(" epoch")[0] + f" {epoch}\n")
    with pytest.raises(SealError, match="line 1"):
        Keyring.load(file, NOW)


def test_of_a_file_of_long_ago_the_keys_are_kept_that_may_still_be_needed(file: Path) -> None:
    ring = Keyring.load(file, NOW + 1000 * DAY)
    # that of the file, which seals, those of today and yesterday, and the one before, by which a client may hold a stub
    assert 3 <= len(ring.ids) <= 4
    assert ring.ids[-1] == ring.sealing


def test_a_file_of_ages_ago_does_not_hold_a_start_up(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "EPOCHS_MAX", 10)
    ring = Keyring.load(file, NOW + 1000 * DAY)
    for _ in range(100):
        ring.advance(NOW + 1000 * DAY)
    monkeypatch.setattr(keyring, "EPOCHS_MAX", 10_000)
    assert ring.ids[0] == Keyring.load(file, NOW + 1000 * DAY).ids[0]
