"""The values that are read when they are asked for, and where they are read."""

from __future__ import annotations

from collections.abc import Callable

from bridge.bank.cache import CachedBank
from bridge.bank.writer import Writer
from bridge.charon.charon import Charon
from bridge.metrics import Metrics
from bridge.net.intercept import Interceptor


def of_charon(metrics: Metrics, charon: Charon) -> None:
    """What both roles have: charon's SAs and the two ends of its HA channel."""
    gauge, total = metrics.gauge, metrics.total

    def charon_drops() -> float:
        end = charon.channel.charon_socket()
        return float(end.drops) if end else 0.0

    gauge("charon_reachable", "1 while charon answers on VICI", lambda: float(charon.vici.connected))
    gauge("ha_ready", "1 while charon's ha plugin is there and understood", lambda: float(charon.channel.ready()))
    gauge("ike_sas", "established IKE_SAs of charon", lambda: charon.tracker.count()[0])
    total("ike_sas_unresumable", "IKE_SAs that cannot be resumed by their kind", lambda: charon.tracker.unresumable)
    total("ha_datagrams", "datagrams that charon's ha plugin sent", lambda: charon.channel.received)
    total("ha_malformed", "such datagrams that were not understood", lambda: charon.channel.malformed)
    total("ha_drops", "HA datagrams of charon's that the kernel dropped", charon.channel.drops)
    total("ha_drops_charon", "HA datagrams to charon that the kernel dropped", charon_drops)


def of_stubs(metrics: Metrics, charon: Charon, writer: Writer, cache: CachedBank) -> None:
    """A gateway's stubs, on their way to the bank and back."""
    gauge, total, counters = metrics.gauge, metrics.total, writer.counters
    gauge(
        "stubs",
        "established IKE_SAs whose stub was given to the bank",
        lambda: charon.tracker.count()[1],
    )
    gauge("bank_pending", "stub changes waiting for the bank", lambda: writer.pending)
    total("bank_stored", "stubs that the bank took", lambda: counters.stored)
    total("bank_deleted", "stubs that were deleted from the bank", lambda: counters.deleted)
    total("bank_refused", "stubs the bank had a newer revision of", lambda: counters.refused)
    total("bank_dropped", "stub changes lost for want of room", lambda: counters.dropped)
    total("bank_write_failures", "attempts to write that the bank did not take", lambda: counters.failures)
    total("stubs_unreadable", "stubs found that did not open", lambda: cache.unreadable)
    gauge("bank_cached", "stubs of failed gateways held here", lambda: cache.size)
    total("bank_cache_hits", "stubs served without a look into the bank", lambda: cache.hits)


def of_queue(metrics: Metrics, interceptor: Callable[[], Interceptor | None]) -> None:
    """The kernel's queue of requests; there is none until the sidecar has got it."""

    def read(what: str) -> Callable[[], float]:
        def value() -> float:
            queue = interceptor()
            return float(getattr(queue.stats(), what)) if queue else 0.0

        return value

    metrics.total("nfqueue_drops", "requests the kernel dropped from the queue", read("drops"))
    metrics.total("nfqueue_packets", "packets read from the queue", read("seen"))
    metrics.gauge("nfqueue_waiting", "packets in the kernel's queue", read("waiting"))
