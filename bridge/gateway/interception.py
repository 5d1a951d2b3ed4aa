"""Requests on their way to charon: the queue, the rules that fill it, and the guard that empties it when the event
loop stands still."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from bridge.charon.ike_sockets import IkeSockets
from bridge.charon.ports import charon_ports
from bridge.config import InterceptConfig
from bridge.net import queue_rules
from bridge.net.firewall import RulesError
from bridge.net.liveness import Liveness
from bridge.net.nfqueue import Interceptor, InterceptUnavailable, Packet
from bridge.net.rules_watch import RulesWatch
from bridge.service.metrics import Metrics
from bridge.service.process import retry
from bridge.service.tasks import end, spawn


class Interception:
    """Gives intercepted batches to `handler` while it is started; `busy` returns whether what was held is being worked
    on, `flooded` whether more comes than clients send; `tag` is what SPIr of rebuilt IKE_SAs ends with.

    What does not fit into the queue goes on to charon. In a flood it is dropped instead: charon would keep a half-open
    IKE_SA of each such request, and as long as all its segments have some, no rebuilt SA is activated. Only requests to
    resume are in the queue, whose clients send them again; with intercept.match anywhere, all requests are. In a flood
    the kernel also meters what it queues (bridge.net.queue_rules).
    """

    def __init__(
        self,
        config: InterceptConfig,
        handler: Callable[[list[Packet]], None],
        busy: Callable[[], bool],
        flooded: Callable[[], bool],
        *,
        tag: bytes,
    ) -> None:
        self._interceptor = Interceptor(config.queue, handler, busy, lambda: self._liveness.check())
        self._liveness = Liveness(self._interceptor.let_go, self._unnoticed, self._beat)
        self._flooded = flooded
        self._only_resumption = config.match == "first"
        self._watch: RulesWatch | None = None
        ports = config.ports or charon_ports()
        self._ike_sockets = IkeSockets(ports)
        if config.rules != "external":
            rules = queue_rules.rules(config.queue, config.match, ports, tag=tag)
            self._watch = RulesWatch(
                "queue", rules, config.rules, matched=queue_rules.matched, metered=queue_rules.metered
            )
        self._bypassed = 0
        self._holds = 0
        """activations, or the start of a charon, that hold requests back"""
        self._kernel_holds = False
        self._watching: asyncio.Task[None] | None = None

    def shows_first_requests(self) -> bool:
        """Whether the rules are in place that show requests on rebuilt IKE_SAs; an operator's own do not."""
        return self._watch is not None and self._watch.in_place

    # bridge.charon.handshakes.Hold

    def can_hold(self) -> bool:
        """Whether the rules are in place that show what may begin a handshake, and the kernel can be told when."""
        return self._watch is not None and self._watch.in_place and self._watch.placed.full

    @contextlib.contextmanager
    def holding(self) -> Iterator[Callable[[], bool]]:
        """No request that may begin a handshake reaches charon meanwhile, as long as what is given returns True: the
        event loop may stand still, or the rules be removed."""
        stalls = self._liveness.stalls
        self._holds += 1
        self._interceptor.close_gate()
        try:
            yield lambda: self._hold_on() and self._liveness.stalls == stalls
        finally:
            self._holds -= 1
            self._interceptor.open_gate()
            self._keep_what_overflows()

    async def read(self) -> bool:
        """Wait until charon has read what came before; whether it has."""
        return await self._ike_sockets.read()

    def _hold_on(self) -> bool:
        """Have the kernel queue what may begin a handshake, for as long as it can remember; whether it does."""
        if not self.can_hold():
            return False
        self._liveness.beat()
        return self._kernel_holds

    async def start(self) -> None:
        """Take the queue over and set its rules, as soon as that works."""
        loop = asyncio.get_running_loop()
        await retry("nfqueue", lambda: self._interceptor.start(loop), InterceptUnavailable)
        if self._watch is not None:
            await retry("rules", self._watch.place_aside, RulesError)
            self._liveness.start(loop, self._watch.placed)
            self._watching = spawn("queue-rules", self._watch.run(self._looked))

    async def close(self) -> None:
        """Let charon have all requests."""
        if self._watching is not None:
            await end(self._watching)
        self._liveness.stop()
        if self._watch is not None:
            self._watch.remove()
        self._interceptor.stop()
        self._ike_sockets.close()

    def _beat(self) -> None:
        if self._only_resumption and self._flooded():
            self._liveness.flood()
        if self._holds:
            self._kernel_holds = self._liveness.hold()
        self._keep_what_overflows()

    def _keep_what_overflows(self) -> None:
        flooded = self._only_resumption and self._flooded()
        # a kernel that takes no order now gets it with the next beat
        with contextlib.suppress(OSError):
            self._interceptor.fail_open(not flooded and not self._holds)

    def _unnoticed(self) -> None:
        if self._watch is not None:
            self._watch.look_now()

    def _looked(self) -> None:
        # rules that were just put back know of no sidecar yet
        self._liveness.beat()
        self._count_bypassed()

    def _count_bypassed(self) -> None:
        """What the rules counted and the sidecar neither got nor will get. The rules were read first, so what came
        since counts for the sidecar: it is never too much."""
        assert self._watch is not None
        stats = self._interceptor.stats()
        missed = self._watch.counted("matched") - stats.seen - stats.waiting - stats.drops
        self._bypassed = max(self._bypassed, missed)

    def gauges(self, metrics: Metrics) -> None:
        """Their state, for `status`."""
        queue, total = self._interceptor, metrics.total
        total("nfqueue_drops", "requests the kernel dropped from the queue", lambda: queue.stats().drops)
        total("nfqueue_packets", "packets read from the queue", lambda: queue.stats().seen)
        metrics.gauge("nfqueue_waiting", "packets in the kernel's queue", lambda: queue.stats().waiting)
        total("event_loop_stalls", "how often the event loop stood still for a second", lambda: self._liveness.stalls)
        watch = self._watch
        if watch is None:
            return
        total(
            "nfqueue_bypassed",
            "requests to resume that passed the sidecar: the queue was full, or the event loop stood still",
            lambda: self._bypassed,
        )
        total(
            "nfqueue_metered",
            "messages that the kernel dropped in a flood, in front of the queue",
            lambda: watch.counted("metered"),
        )
        metrics.gauge(
            "queue_rules_in_place",
            "1 while the rules that show requests to the sidecar are in place",
            lambda: float(watch.in_place),
        )
        total("queue_rules_restored", "how often they had to be put back", lambda: watch.restored)
