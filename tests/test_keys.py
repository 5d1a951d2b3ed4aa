"""Keys (bridge.ike.keys): the RFCs' own vectors, and the formulas. What charons derive is in test_sa_tracker.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.ike.keys import (
    IkeKeys,
    derive_keys,
    derive_sk_d,
    prf,
    prf_plus,
    skeyseed_initial,
    skeyseed_rekey,
    skeyseed_resume,
)
from bridge.ike.transforms import PRF_OUTPUT, Encr, Group, Integ, Prf, Suite, UnsupportedSuite

SUITE = Suite(
    encr=Encr.AES_CBC, encr_len=256, integ=Integ.HMAC_SHA2_256_128, prf=Prf.HMAC_SHA2_256, group=Group.CURVE_25519
)
COUNTING = bytes(range(20))


@pytest.mark.parametrize(
    ("algorithm", "output"),
    [
        (Prf.HMAC_SHA1, "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79"),  # RFC 2202 section 3, case 2
        # RFC 4231 section 4.3
        (Prf.HMAC_SHA2_256, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"),
        (
            Prf.HMAC_SHA2_384,
            "af45d2e376484031617f78d2b58a6b1b9c7ef464f5a01b47e42ec3736322445e8e2240ca5e69e2c78b3239ecfab21649",
        ),
        (
            Prf.HMAC_SHA2_512,
            "164b7a7bfcf819e2e395fbe73b56e0a387bd64222e831fd610270cd7ea250554"
            "9758bf75c05a994a6d034f65f8f0e6fdcaeab1a34d4a6b4b636e070a38bce737",
        ),
    ],
)
def test_hmac_prfs_give_the_rfcs_output(algorithm: Prf, output: str) -> None:
    assert prf(algorithm, b"Jefe", b"what do ya want for nothing?").hex() == output


@pytest.mark.parametrize(
    ("key", "output"),
    [
        (bytes(range(16)), "47f51b4564966215b8985c63055ed308"),
        (bytes(range(10)), "0fa087af7d866e7653434e602fdde835"),
        (bytes(range(16)) + b"\xed\xcb", "8cd3c93ae598a9803006ffb67c40e9e4"),
    ],
)
def test_aes_xcbc_prf_gives_the_output_of_rfc_4434(key: bytes, output: str) -> None:
    assert prf(Prf.AES128_XCBC, key, COUNTING).hex() == output


@pytest.mark.parametrize(
    ("key", "output"),
    [
        (bytes(range(16)), "980ae87b5f4c9c5214f5b6a8455e4c2d"),
        (bytes(range(10)), "290d9e112edb09ee141fcf64c0b72f3d"),
        (bytes(range(16)) + b"\xed\xcb", "84a348a4a45d235babfffc0d2b4da09a"),
    ],
)
def test_aes_cmac_prf_gives_the_output_of_rfc_4615(key: bytes, output: str) -> None:
    assert prf(Prf.AES128_CMAC, key, COUNTING).hex() == output


@pytest.mark.parametrize(
    ("length", "output"),
    [
        (0, "75f0251d528ac01c4573dfd584d79f29"),
        (3, "5b376580ae2f19afe7219ceef172756f"),
        (16, "d2a246fa349b68a79998a4394ff7a263"),
    ],
)
def test_aes_xcbc_gives_the_output_of_rfc_3566(length: int, output: str) -> None:
    assert prf(Prf.AES128_XCBC, bytes(range(16)), bytes(range(length))).hex() == output


@pytest.mark.parametrize("algorithm", PRF_OUTPUT)
def test_every_prf_has_the_output_length_it_is_listed_with(algorithm: Prf) -> None:
    assert len(prf(algorithm, b"key", b"data")) == PRF_OUTPUT[algorithm]


@pytest.mark.parametrize("algorithm", [0, Prf.HMAC_MD5, 3, 9, 65535])
def test_a_prf_that_is_not_implemented_is_named(algorithm: int) -> None:
    with pytest.raises(UnsupportedSuite, match=str(int(algorithm))):
        prf(algorithm, b"", b"")


@pytest.mark.parametrize("algorithm", PRF_OUTPUT)
def test_prf_plus_chains_blocks_with_a_counter(algorithm: Prf) -> None:
    t1 = prf(algorithm, b"K", b"S\x01")
    t2 = prf(algorithm, b"K", t1 + b"S\x02")
    assert prf_plus(algorithm, b"K", b"S", 2 * len(t1)) == t1 + t2
    assert prf_plus(algorithm, b"K", b"S", 5) == t1[:5]


def test_prf_plus_ends_after_255_blocks() -> None:
    assert len(prf_plus(Prf.HMAC_SHA1, b"K", b"S", 255 * 20)) == 255 * 20
    with pytest.raises(ValueError, match="255"):
        prf_plus(Prf.HMAC_SHA1, b"K", b"S", 255 * 20 + 1)


def test_skeyseed_of_a_resumption_is_the_drafts() -> None:
    # draft-xu-ike-sa-sync-01 section 3.3
    assert skeyseed_resume(Prf.HMAC_SHA2_256, b"SK_d", b"Ni", b"Nr") == prf(Prf.HMAC_SHA2_256, b"SK_d", b"NiNr")


@given(st.sampled_from(list(PRF_OUTPUT)), st.binary(), st.binary(min_size=16), st.binary(min_size=16))
def test_a_resumption_is_a_rekey_with_an_empty_shared_secret(p: Prf, sk_d: bytes, ni: bytes, nr: bytes) -> None:
    assert skeyseed_resume(p, sk_d, ni, nr) == skeyseed_rekey(p, sk_d, b"", ni, nr)


@pytest.mark.parametrize("algorithm", [Prf.AES128_XCBC, Prf.AES128_CMAC])
def test_prfs_with_a_fixed_key_size_take_eight_octets_of_each_nonce(algorithm: Prf) -> None:
    # RFC 7296 section 2.14
    ni, nr = bytes(range(32)), bytes(range(32, 64))
    assert skeyseed_initial(algorithm, b"secret", ni, nr) == prf(algorithm, ni[:8] + nr[:8], b"secret")


def test_other_prfs_take_the_whole_nonces() -> None:
    assert skeyseed_initial(Prf.HMAC_SHA1, b"g", b"Ni", b"Nr") == prf(Prf.HMAC_SHA1, b"NiNr", b"g")


def test_all_keys_are_taken_from_prf_plus_in_the_rfcs_order() -> None:
    keys = derive_keys(SUITE, b"seed", b"Ni", b"Nr", b"I" * 8, b"R" * 8)
    octets = prf_plus(SUITE.prf, b"seed", b"NiNr" + b"I" * 8 + b"R" * 8, 32 * 7)
    assert b"".join(keys) == octets
    assert [len(key) for key in keys] == [32] * 7


def test_sk_d_alone_is_the_first_of_the_keys() -> None:
    arguments = (SUITE, b"seed", b"Ni", b"Nr", b"I" * 8, b"R" * 8)
    assert derive_sk_d(*arguments) == derive_keys(*arguments).sk_d


@pytest.mark.parametrize(
    ("encr", "bits", "integ", "lengths"),
    [
        (Encr.AES_GCM_16, 128, 0, (0, 20)),
        (Encr.AES_GCM_16, 256, 0, (0, 36)),
        (Encr.AES_CCM_8, 192, 0, (0, 27)),
        (Encr.CHACHA20_POLY1305, 0, 0, (0, 36)),
        (Encr.AES_CTR, 128, Integ.HMAC_SHA1_96, (20, 20)),
        (Encr.DES_3, 0, Integ.HMAC_SHA2_512_256, (64, 24)),
        (Encr.AES_CBC, 256, Integ.AES_XCBC_96, (16, 32)),
    ],
)
def test_key_lengths_follow_the_algorithms(encr: int, bits: int, integ: int, lengths: tuple[int, int]) -> None:
    suite = Suite(encr=encr, encr_len=bits, integ=integ, prf=Prf.HMAC_SHA2_256, group=Group.ECP_256)
    keys = derive_keys(suite, b"seed", b"Ni", b"Nr", bytes(8), bytes(8))
    assert (len(keys.sk_ai), len(keys.sk_ei)) == (len(keys.sk_ar), len(keys.sk_er)) == lengths


def test_keys_do_not_show() -> None:
    assert "secret" not in repr(IkeKeys(*[b"secret"] * 7))


def test_further_secrets_of_a_rekey_follow_the_nonces() -> None:
    # RFC 9370 section 2.2.4
    seed = skeyseed_rekey(Prf.HMAC_SHA2_256, b"SK_d", b"SK(0)", b"Ni", b"Nr", b"SK(1)SK(2)")
    assert seed == prf(Prf.HMAC_SHA2_256, b"SK_d", b"SK(0)NiNrSK(1)SK(2)")
