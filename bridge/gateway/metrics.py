"""A gateway's metrics: of requests, stubs and the queue."""

from __future__ import annotations

from collections.abc import Iterable

from bridge.bank.interface import StubBank
from bridge.bank.prefetch import Prefetch
from bridge.bank.write_queue import WriteQueue
from bridge.charon.charon import Charon
from bridge.service.metrics import Metrics


def of_stubs(metrics: Metrics, charon: Charon, writer: WriteQueue, bank: StubBank, prefetch: Prefetch) -> None:
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
    total("bank_spoilt", "keys and members found in the bank that no gateway wrote", lambda: bank.spoilt)
    total("stubs_unreadable", "stubs found that did not open", lambda: bank.unreadable)
    gauge("bank_cached", "stubs of failed gateways held here", lambda: prefetch.size)
    total("bank_cache_hits", "stubs served from memory, since the bank did not answer in time", lambda: prefetch.hits)


class GatewayMetrics(Metrics):
    """Counters of the gateway."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = self.counter("requests", "IKE_SA_INIT requests with IKE_SA_SYNC")
        self.malformed = self.counter("malformed_requests", "IKE_SA_INIT requests that could not be parsed")
        self.retransmissions = self.counter("retransmissions", "requests that were seen before")
        self.resumed = self.counter("resumptions", "rebuilt IKE_SAs that were confirmed")
        self._refused = self.counter("refusals", "requests with IKE_SA_SYNC that were not served", ("reason",))
        self.refusals_told = self.counter(
            "refusals_told", "of these, requests that were answered with a notification and kept from charon"
        )
        self._cookies = self.counter(
            "cookies", "requests with IKE_SA_SYNC that were answered with a cookie", ("reason",)
        )
        self.removed = self.counter("unconfirmed_removed", "rebuilt IKE_SAs removed because none confirmed them")
        self.moved_away = self.counter(
            "moved_away", "IKE_SAs ended here because their session went on at another gateway"
        )
        self.moved_away_failures = self.counter(
            "moved_away_failures",
            "attempts to end such an IKE_SA that failed: charon was reached neither over VICI nor over the HA channel",
        )
        self.duplicates = self.counter(
            "duplicate_addresses", "handshakes that were given a virtual IP which another peer's session has"
        )
        self.authentication_ended = self.counter(
            "authentication_ended", "resumed IKE_SAs ended because their client did not authenticate again in time"
        )
        self._hook_calls = self.counter("hook_calls", "calls of hooks.session", ("event",))
        self._hook_failures = self.counter(
            "hook_failures", "events of sessions that hooks.session did not take", ("reason",)
        )
        self.checks_answered = self.counter(
            "liveness_checks_answered", "requests of clients answered for charon while it had the IKE_SA PASSIVE"
        )
        self.requests_held = self.counter(
            "requests_held", "requests of clients held until charon had activated the IKE_SA"
        )
        self.strays = self.counter("stray_messages", "messages dropped that are about no IKE_SA here, or not authentic")
        self.handed = self.counter("stubs_handed", "stubs given to clients that asked for theirs")
        self.presented = self.counter("stubs_presented", "requests served with a stub that the client held")
        self.bank_errors = self.counter("bank_errors", "failed look-ups in the bank")
        self.bank_seconds = self.histogram("bank_get_seconds", "time to fetch the stubs of one batch of requests")
        self.ping_seconds = self.histogram("bank_ping_seconds", "time that the bank takes to answer")
        self.install_seconds = self.histogram(
            "install_seconds",
            "time to install the IKE_SAs of one batch, and to activate those that are active before the answer",
        )
        self.activation_seconds = self.histogram(
            "activation_seconds", "how long the IKE_SAs of one segment did not answer during an activation, at most"
        )

    def expect(self, refusals: Iterable[str], demands: Iterable[str]) -> None:
        """Show what has not happened yet as 0: a rate needs a value before the first."""
        for reason in refusals:
            self._refused.labels(str(reason))
        for reason in demands:
            self._cookies.labels(str(reason))

    def refused(self, reason: str) -> None:
        """Count a request that was not served."""
        self._refused.labels(str(reason)).inc()

    def expect_hooks(self, events: Iterable[str], failures: Iterable[str]) -> None:
        """Show as 0 what hooks.session was not called for yet."""
        for event in events:
            self._hook_calls.labels(str(event))
        for failure in failures:
            self._hook_failures.labels(str(failure))

    def hook_called(self, event: str) -> None:
        """Count a call of hooks.session."""
        self._hook_calls.labels(event).inc()

    def hook_failed(self, reason: str) -> None:
        """Count an event that hooks.session did not take."""
        self._hook_failures.labels(reason).inc()

    def challenged(self, reason: str, count: int) -> None:
        """Count requests that have to come again with a cookie."""
        self._cookies.labels(str(reason)).inc(count)
