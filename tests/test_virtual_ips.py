"""bridge.charon.virtual_ips: which IKE_SAs have which virtual IP."""

from __future__ import annotations

from bridge.charon.virtual_ips import VirtualIps

A, B = b"A" * 16, b"B" * 16
V4, V6 = "10.20.1.1", "fd20::1"


def table(**have: tuple[str, ...]) -> VirtualIps:
    made = VirtualIps()
    for name, addresses in have.items():
        made.put({"a": A, "b": B}[name], addresses, 1.0)
    return made


def test_an_sa_holds_each_of_its_addresses_of_either_family() -> None:
    made = table(a=(V4, V6))
    assert made.holders([V4]) == made.holders([V6]) == made.holders([V4, V6]) == {A}
    assert not made.holders(["10.20.1.2"])


def test_an_address_that_two_have_is_shared_until_one_ends() -> None:
    made = table(a=(V4, V6), b=(V4,))
    assert made.shared() == {V4: {A, B}}
    made.drop(A)
    assert not made.shared()
    assert made.holders([V4]) == {B}
    assert not made.holders([V6])


def test_an_sa_that_gets_another_address_holds_the_first_no_more() -> None:
    made = table(a=(V4,))
    made.put(A, (V6,), 2.0)
    assert not made.holders([V4])
    assert made.holders([V6]) == {A}
    made.put(A, (), 3.0)
    assert len(made) == 0


def test_what_charon_does_not_list_is_dropped_unless_it_came_after_the_question() -> None:
    made = table(a=(V4,))
    made.put(B, (V6,), 5.0)
    made.keep(set(), since=3.0)
    assert not made.holders([V4])
    assert made.holders([V6]) == {B}
    made.keep({B}, since=9.0)
    assert made.holders([V6]) == {B}


def test_a_charon_that_was_restarted_has_none() -> None:
    made = table(a=(V4,))
    made.clear()
    assert len(made) == 0
    assert not made.holders([V4])
