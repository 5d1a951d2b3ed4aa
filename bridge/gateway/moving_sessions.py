"""Sessions that come to a gateway from another one, or leave it for one: whose parts are told, and in which order."""

from __future__ import annotations

from collections.abc import Callable

from bridge.charon.ike_sa import IkeSa
from bridge.gateway.address_keeper import AddressKeeper
from bridge.gateway.living import LivingSas
from bridge.gateway.session_hooks import SessionHooks
from bridge.stub.stub import Index, Stub


class MovingSessions:
    """`on_came` and `on_gone` get each IKE_SA whose session came here, either way, and each that is gone."""

    def __init__(self, hooks: SessionHooks, living: LivingSas, keeper: AddressKeeper) -> None:
        self._hooks = hooks
        self._living = living
        self._keeper = keeper
        self.on_came: list[Callable[[IkeSa], None]] = []
        self.on_gone: list[Callable[[IkeSa], None]] = [hooks.gone, keeper.gone]

    def taken_over(self, sa: IkeSa, old: Stub) -> None:
        """A session came here as it is, from another gateway with the same address."""
        self._hooks.taken_over(sa, old)
        self._living.put(sa)
        self.came(sa)

    def came(self, sa: IkeSa) -> None:
        """A session came here, either way."""
        for each in self.on_came:
            each(sa)

    async def moving_away(self, sa: IkeSa, new: Index | None = None) -> None:
        """A session of this gateway went on elsewhere, and is about to be ended here; without `new`, it goes on as it
        is at a gateway with the same address."""
        if new is not None:
            self._hooks.moving_away(sa, new.gateway)
        await self._keeper.keep(sa, new)

    def dropped(self, sa: IkeSa) -> None:
        """An SA that goes on as it is elsewhere is gone, without an event from charon."""
        self._hooks.moving_away(sa, None)
        self._living.take_out(sa)
        self.gone(sa)

    def gone(self, sa: IkeSa) -> None:
        """An SA is gone."""
        for each in self.on_gone:
            each(sa)
