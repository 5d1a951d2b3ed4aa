"""Every fuzz target (fuzz/targets.py) on what is kept of earlier runs, and on a few hundred mutations of that.

The coverage-guided runs, which are long, need atheris: fuzz/README.md.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.corpus import KEPT, kept
from fuzz.targets import TARGETS

CORPUS = {name: [*target.seeds(), *kept(name)] for name, target in TARGETS.items()}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_runs_over_its_seeds_and_all_that_is_kept(name: str) -> None:
    assert CORPUS[name]
    for octets in CORPUS[name]:
        TARGETS[name].run(octets)


def test_nothing_is_kept_for_a_target_that_is_not_there() -> None:
    assert {path.stem for path in KEPT.glob("*.hex")} <= set(TARGETS)


@st.composite
def mutations(draw: st.DrawFn, corpus: list[bytes]) -> bytes:
    """One of the corpus with some octets altered, taken out, put in or repeated."""
    octets = bytearray(draw(st.sampled_from(corpus)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(octets)))
        size = draw(st.integers(0, 8))
        match draw(st.sampled_from(["alter", "cut", "insert", "repeat"])):
            case "alter":
                octets[at : at + size] = draw(st.binary(min_size=size, max_size=size))
            case "cut":
                del octets[at : at + size]
            case "insert":
                octets[at:at] = draw(st.binary(min_size=size, max_size=size))
            case "repeat":
                octets[at:at] = octets[at : at + 4 * size]
    return bytes(octets)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_holds_on_mutations_of_its_corpus(name: str) -> None:
    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(mutations(CORPUS[name]))
    def holds(octets: bytes) -> None:
        TARGETS[name].run(octets)

    holds()
