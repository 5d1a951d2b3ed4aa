"""Rounds of disturbances, and the report."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from bridge.lab.space import LabError
from chaos import invariants
from chaos.attacker import Attacker
from chaos.disturbances import ROUND_SECONDS, Event, plan
from chaos.invariants import Logs, Memory, violated
from chaos.world import World

SETTLE_SECONDS = 60.0
"""from the end of a round, when everything runs again, until all has to hold. charon itself needs some of it: its
clients notice a dead gateway after 4 s and go on trying for up to 10 s between attempts; a gateway that comes back ends
what went on elsewhere once the bank has told it"""
LOOK_SECONDS = 0.5
USER_SECONDS = 3.0
"""that a client is without an IKE_SA before its user connects again: its sidecar may be about to do so"""
LET_IN = 0.5
"""how probably a client that is locked out is let in again in a round"""
Say = Callable[[str], None]


@dataclass
class Violation:
    """What did not hold, and how to see it again."""

    seed: int
    round: int
    lines: list[str]
    events: list[str]


@dataclass
class Report:
    """What came of all rounds."""

    seed: int
    rounds: int = 0
    violations: list[Violation] = field(default_factory=list)
    settled: list[float] = field(default_factory=list)
    """seconds from the end of each round until all held"""
    reconnected: Counter[str] = field(default_factory=Counter)
    """sessions that users began again, by why they had ended"""
    outcomes: Counter[str] = field(default_factory=Counter)
    """of the clients' attempts to move"""

    def text(self) -> str:
        """For people."""
        settled = sorted(self.settled) or [0.0]
        lines = [
            f"{self.rounds} rounds with seed {self.seed}, {len(self.violations)} with violations",
            f"settled within {settled[len(settled) // 2]:.1f} s (median), {settled[-1]:.1f} s (longest)",
            "moves: " + (", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items())) or "none"),
            "begun again by users: "
            + (", ".join(f"{count} since {why}" for why, count in sorted(self.reconnected.items())) or "none"),
        ]
        for one in self.violations:
            lines += [f"round {one.round} (--seed {one.seed} --first {one.round}):"]
            lines += [f"    {line}" for line in (*one.events, *(f"VIOLATION {line}" for line in one.lines))]
        return "\n".join(lines)


class Chaos:
    """Disturbs a world. `keep`: where logs of a round with a violation go."""

    def __init__(self, world: World, seed: int, say: Say, *, most: int = 3, keep: Path | None = None) -> None:
        self._world = world
        self._say = say
        self._most = most
        self._keep = keep
        self._logs = Logs()
        self.memory = Memory()
        self._logged: dict[str, int] = {}
        self._attacker = Attacker(world)
        self._without: dict[str, float] = {}
        """since when clients have no IKE_SA"""
        self.report = Report(seed)

    def begin(self) -> None:
        """Everything holds before the first round. Raises LabError."""
        self._mark()
        lines = self._settle(time.monotonic())
        if lines:
            raise LabError("before the first round: " + "; ".join(lines))

    def round(self, number: int) -> bool:
        """One round; whether all held after it."""
        random = Random(f"{self.report.seed}/{number}")
        world = self._world
        events = plan(world, random, self._most)
        events += self._let_in(random)
        thrown: list[str] = []
        events.append(Event(random.uniform(1, 9), "attack", lambda: thrown.append(self._attacker.throw(random))))
        failed: list[str] = []
        told = self._run(sorted(events, key=lambda event: event.at), failed)
        try:
            world.heal()
            world.finish()
        except LabError as error:
            failed.append(str(error))
        healed = time.monotonic()
        lines = failed + self._settle(healed)
        took = time.monotonic() - healed
        lines += world.died + self._logs.news(world) + self.memory.look(world)
        self.report.rounds += 1
        self.report.settled.append(took)
        summary = "; ".join([*dict.fromkeys(told), *thrown])
        self._say(f"round {number}: {'VIOLATION' if lines else f'holds after {took:.1f} s'}: {summary}")
        if lines:
            for line in lines:
                self._say(f"    {line}")
            self.report.violations.append(Violation(self.report.seed, number, lines, [*told, *thrown]))
            self._save(number)
        self._mark()
        return not lines

    def _let_in(self, random: Random) -> list[Event]:
        world = self._world
        found = []
        for host in world.clients:
            if random.random() < LET_IN and host.name in world.revoked:
                at = random.choice(world.gateways)
                found.append(Event(0.0, f"unrevoke {host.name}", lambda host=host, at=at: world.unrevoke(host, at)))  # type: ignore[misc]
        return found

    def _run(self, events: list[Event], failed: list[str]) -> list[str]:
        """What was done, and when; `failed` gets what could not be."""
        began = time.monotonic()
        told = []
        for event in events:
            time.sleep(max(0.0, event.at - (time.monotonic() - began)))
            at = time.monotonic() - began
            if event.text != "attack":
                told.append(f"{at:.1f} s {event.text}")
            try:
                event.do()
            except LabError as error:
                failed.append(f"{event.text}: {error}")
        time.sleep(max(0.0, ROUND_SECONDS - (time.monotonic() - began)))
        return told

    def _settle(self, since: float) -> list[str]:
        """Until all holds, or SETTLE_SECONDS have passed: what then does not."""
        while True:
            lines = violated(self._world)
            if not lines or time.monotonic() - since > SETTLE_SECONDS:
                return lines
            self._reconnect()
            time.sleep(LOOK_SECONDS)

    def _reconnect(self) -> None:
        """Users whose session ended in order connect again."""
        world = self._world
        for host in world.clients:
            if host.name in world.revoked or world.sas_or_none(host):
                self._without.pop(host.name, None)
                continue
            now = time.monotonic()
            if now - self._without.setdefault(host.name, now) < USER_SECONDS:
                continue
            why = world.excused.get(host.name)
            if why is None and invariants.ended_by_gateway(host, self._logged.get(host.name, 0)):
                why = "it was ended by a DELETE"
            if why is not None and world.connect(host):
                self.report.reconnected[why] += 1

    def _mark(self) -> None:
        """What happened until now explains nothing that follows."""
        self._world.excused.clear()
        self._world.died.clear()
        self._logged = {host.name: invariants.size(host.charon) for host in self._world.clients}

    def _save(self, number: int) -> None:
        if self._keep is None:
            return
        directory = self._keep / f"seed-{self.report.seed}-round-{number}"
        self._world.keep_logs(directory)
        seen = invariants.look(self._world)
        shown = {"gateways": seen.gateways, "clients": seen.clients, "stubs": sorted(seen.stubs or ())}
        (directory / "seen.json").write_text(json.dumps(shown, indent=1))
        last = self.report.violations[-1]
        (directory / "round.txt").write_text("\n".join([*last.events, "", *last.lines]) + "\n")

    def end(self) -> Report:
        """What came of it."""
        for host in self._world.clients:
            for line in host.sidecars[0].text().splitlines():
                if "event=moved " in line or line.endswith("event=moved"):
                    result = line.partition("result=")[2].partition(" ")[0]
                    reason = line.partition("reason=")[2].partition(" ")[0]
                    self.report.outcomes[f"{result} ({reason})" if reason else result] += 1
        return self.report
