"""Sets rules, looks every few seconds whether they are still there as they were set, and puts them back.

`nft flush ruleset`, with which Debian's nftables.conf begins, and any reload of a firewall remove them without an
error.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import structlog

from bridge.net import firewall
from bridge.net.firewall import Choice, Placed, Rules, RulesError, View

log = structlog.get_logger()

LOOK_SECONDS = 5.0
IN_FORCE_SECONDS = 1.0
"""after which nothing is under way any more that passed before they were set"""


class RulesWatch:
    """Of one set of rules. `about`: what they are for, for the log; `counts`: kinds of packets that matter, out of a
    view's counters, by name."""

    def __init__(self, about: str, rules: Rules, backend: Choice, **counts: Callable[[View], int]) -> None:
        self.in_place = False
        self.restored = 0
        """how often they had to be put back"""
        self._about = about
        self._rules = rules
        self._backend = backend
        self._counts = counts
        self._placed: Placed | None = None
        self._since: float | None = None
        """since when every look found them (monotonic seconds)"""
        self._expected: tuple[str, ...] = ()
        self._counted_before = dict.fromkeys(counts, 0)
        self._counted = dict.fromkeys(counts, 0)
        self._now = asyncio.Event()
        self._logged = ""

    def counted(self, kind: str) -> int:
        """Packets of a kind that the rules counted since they were first set, as of the last look."""
        return self._counted_before[kind] + self._counted[kind]

    @property
    def placed(self) -> Placed:
        """By what they were set, once they were."""
        assert self._placed is not None
        return self._placed

    def place(self) -> None:
        """Set them, in the network namespace of the process. Blocks. Raises RulesError."""
        placed = firewall.install(self._rules, backend=self._backend)
        self._expected = firewall.look(self._rules, placed).lines
        self._counted_before = {kind: self.counted(kind) for kind in self._counts}
        self._counted = dict.fromkeys(self._counts, 0)
        if not placed.full:
            log.warning("rules-without-guard", rules=self._about, missing="xt_recent")
        self._placed, self.in_place, self._since = placed, True, time.monotonic()

    async def place_aside(self) -> None:
        """The same in a thread, while the event loop goes on. No thread can be cancelled: the caller, if it is, waits,
        or the rules would be set after what it does next; that they could not be set is in the log then. Raises
        RulesError."""
        work = asyncio.ensure_future(asyncio.to_thread(self.place))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            while not work.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([work])
            if not work.cancelled() and (error := work.exception()) is not None:
                if not isinstance(error, RulesError):
                    raise error from None
                self._missing()
                log.error("rules-not-restored", rules=self._about, reason=str(error))
            raise

    def remove(self) -> None:
        """Take them away. Blocks. Raises RulesError."""
        firewall.remove(self._rules)
        self._missing()

    def _missing(self) -> None:
        self.in_place, self._since = False, None

    def look_now(self) -> None:
        """Something suggests that they are gone."""
        self._now.set()

    async def in_place_since(self, moment: float) -> bool:
        """Whether they were in place at `moment` (monotonic seconds), are now, and no look between missed them. Asked
        of the kernel only where that may be so."""
        since = self._since
        if since is None or since + IN_FORCE_SECONDS > moment:
            return False
        try:
            view = await asyncio.to_thread(firewall.look, self._rules, self.placed)
        except RulesError:
            return False
        if not view.lines or view.lines != self._expected:
            self._since = None
            self.look_now()
        return since == self._since

    async def run(self, looked: Callable[[], None] = lambda: None) -> None:
        """Look, and put back, until cancelled; `looked` is called after each look."""
        while True:
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._now.wait()
            except TimeoutError:
                pass
            self._now.clear()
            try:
                await self._look()
                self._logged = ""
            except RulesError as error:
                self._missing()
                if str(error) != self._logged:
                    log.error("rules-not-restored", rules=self._about, reason=str(error))
                self._logged = str(error)
                # whatever suggests that they are gone does so all the time now
                await asyncio.sleep(LOOK_SECONDS)
            looked()

    async def _look(self) -> None:
        view = await asyncio.to_thread(firewall.look, self._rules, self.placed)
        if view.lines == self._expected:
            self.in_place = True
            if self._since is None:
                self._since = time.monotonic()
            for kind, count in self._counts.items():
                self._counted[kind] = max(self._counted[kind], count(view))
            return
        self._missing()
        log.warning("rules-lost", rules=self._about, how="altered" if view.lines else "removed")
        await self.place_aside()
        self.restored += 1
        log.info("rules-restored", rules=self._about)
