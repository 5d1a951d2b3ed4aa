"""Which part of a gateway follows which keys of the bank, and what a bank that was away has to do with each."""

from __future__ import annotations

from dataclasses import dataclass

from bridge.bank.key_rotation import KeyRotation
from bridge.bank.keyspace import Event
from bridge.bank.prefetch import Prefetch
from bridge.gateway.bank_events import BankEvents
from bridge.gateway.bank_reconciler import BankReconciler
from bridge.gateway.failover import Failover
from bridge.gateway.left_in_kernel import LeftInKernel
from bridge.gateway.revocation import LockOut
from bridge.gateway.session_elsewhere import SessionElsewhere
from bridge.gateway.shared_addresses import SharedAddresses
from bridge.stub import bank_keys


@dataclass(frozen=True, slots=True)
class BankFollowers:
    """The parts that follow what happens in the bank."""

    prefetch: Prefetch
    failover: Failover
    reconciler: BankReconciler
    elsewhere: SessionElsewhere
    lock_out: LockOut
    rotation: KeyRotation
    left: LeftInKernel
    shared: SharedAddresses | None = None
    """where gateways share addresses"""

    def follow(self, events: BankEvents) -> None:
        """Before `events` begin: have each get what it follows."""
        # the patterns of fetched stubs come and go
        events.follow(bank_keys.STUB, self.prefetch.on_event)
        events.follow(bank_keys.STUB, self.failover.stub_event)
        events.follow(bank_keys.HEARTBEAT, self.failover.heartbeat_event, f"{bank_keys.HEARTBEAT}*")
        events.follow(bank_keys.GONE, self.reconciler.gone_event, bank_keys.gone_pattern(None))
        moved = map(bank_keys.moved_pattern, sorted(self.reconciler.addresses))
        events.follow(bank_keys.MOVED, self.elsewhere.on_event, *moved)
        events.follow(bank_keys.MOVED, self.left.on_event)
        events.follow(bank_keys.REVOKED_KIND, self._revoked, bank_keys.REVOKED_STAMP)
        events.on_state(self._listening)
        self.reconciler.on_address = lambda address: events.add(bank_keys.moved_pattern(address))
        self.prefetch.attach(events)

    def _revoked(self, _: Event) -> None:
        self.lock_out.soon()

    def _listening(self, listening: bool) -> None:
        self.failover.disturbed()
        self.prefetch.on_state(listening)
        if listening:
            self.returned()

    def returned(self) -> None:
        """A bank was away, or is another one than before."""
        self.reconciler.returned()
        self.lock_out.soon()
        self.rotation.returned()
        if self.shared is not None:
            # another gateway may have taken sessions meanwhile, and its word of it is not repeated
            self.shared.look_soon()
