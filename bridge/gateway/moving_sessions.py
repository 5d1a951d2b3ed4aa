"""What the parts of a gateway do with sessions that come to it from another gateway, or leave it for one."""

from __future__ import annotations

from dataclasses import dataclass

from bridge.charon.ike_sa import IkeSa
from bridge.gateway.address_keeper import AddressKeeper
from bridge.gateway.authentication_end import AuthenticationEnd
from bridge.gateway.duplicates import Duplicates
from bridge.gateway.living import LivingSas
from bridge.gateway.return_path import ReturnPath
from bridge.gateway.session_hooks import SessionHooks
from bridge.gateway.uniqueness import Uniqueness
from bridge.stub.stub import Index, Stub


@dataclass(frozen=True, slots=True)
class MovingSessions:
    """Those parts."""

    hooks: SessionHooks
    living: LivingSas
    uniqueness: Uniqueness
    authentication: AuthenticationEnd
    duplicates: Duplicates
    keeper: AddressKeeper
    return_path: ReturnPath

    def taken_over(self, sa: IkeSa, old: Stub) -> None:
        """A session came here as it is, from another gateway with the same address."""
        self.hooks.taken_over(sa, old)
        self.living.put(sa)
        self.came(sa)

    def came(self, sa: IkeSa) -> None:
        """A session came here, either way."""
        self.uniqueness.resumed(sa)
        self.authentication.watch(sa)
        self.return_path.changed(sa)
        self.keeper.taken(sa)

    async def moving_away(self, sa: IkeSa, new: Index) -> None:
        """A session of this gateway went on elsewhere, and is about to be ended here."""
        self.hooks.moving_away(sa, new.gateway)
        await self.keeper.keep(sa, new)

    async def before_drop(self, sa: IkeSa) -> None:
        """Another gateway with the same address took a session over, and its SA is about to be removed here."""
        await self.keeper.keep(sa)

    def dropped(self, sa: IkeSa) -> None:
        """That SA is gone, without an event of charon's."""
        self.hooks.moving_away(sa, None)
        self.living.take_out(sa)
        self.gone(sa)

    def gone(self, sa: IkeSa) -> None:
        """An SA is gone."""
        self.hooks.gone(sa)
        self.duplicates.gone(sa.id.spis)
        self.authentication.forget(sa)
        self.keeper.gone(sa)
        self.return_path.gone(sa.id.spis)
