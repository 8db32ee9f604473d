# SPDX-License-Identifier: Apache-2.0
"""luod is killed at every point of a whole update, and broken luods are caught by the same sweep."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from luod.adapters.keeper import server as keeper_server
from luod.daemon import director, recovery
from luod.demo.host import Setting
from luod.demo.sweep import Verdict, all_settings, one_run, sweep, verdict_of
from luod.engine import runner
from luod.engine.reconcile import Action

SMALL = Setting(sessions=2, size=64 << 10)
pytestmark = pytest.mark.timeout(300)


def test_every_crash_point(disk_path: Path) -> None:
    """The same sweep as `luoctl demo --crash all`."""
    clean, settings = all_settings(disk_path, SMALL)
    assert clean.ending == "done"
    assert len(settings) > 60
    stages = {setting.kill_at.rpartition(":")[2] for setting in settings}
    assert stages == {"before_intent", "after_intent", "after_call", "after_outcome"}
    kinds = {setting.kill_at.rpartition(":")[0].rpartition("/")[2] for setting in settings}
    assert kinds >= {
        "create",
        "mark",
        "hand",
        "scratch",
        "reboot",
        "retrieve",
        "release",
        "load",
        "box.create",
        "box.preserve",
        "box.finish",
    }
    verdicts = list(sweep(disk_path, settings, os.cpu_count() or 2))
    assert [(one.point, one.problems) for one in verdicts if one.problems] == []
    assert {one.ending for one in verdicts} == {"done", "aborted"}
    assert all(one.restarts == 1 for one in verdicts)
    assert all(one.bytes_verified == SMALL.sessions * SMALL.size for one in verdicts)


def test_a_refused_kexec_is_rolled_back(disk_path: Path) -> None:
    outcome, found = one_run(disk_path / "run", replace(SMALL, refuse=True))
    assert found == []
    assert outcome is not None
    assert outcome.ending == "aborted"
    assert outcome.update is not None
    assert outcome.update["refused"] == "EBUSY"
    assert "EBUSY" in outcome.update["reason"]


def blind_redo() -> None:
    """Whatever is in doubt is made again."""
    runner.effect_action = lambda *_, **__: Action.REDO


def no_second_holder() -> None:
    """The keeper answers, but does not keep."""
    honest = keeper_server.Keeper._drain_wake

    def forgetful(self: keeper_server.Keeper) -> None:
        honest(self)
        for name in list(self._held):
            if name.startswith("luod.vm"):
                self._close(name)

    keeper_server.Keeper._drain_wake = forgetful  # type: ignore[method-assign]


def never_waits_for_the_silent() -> None:
    """An update goes on without clients whose connection has died with luod."""
    director.Director._participants = lambda self, update: [  # type: ignore[method-assign]
        one for one in self.engine.book.sessions() if one.update == update
    ]


def keeps_what_has_ended() -> None:
    """Recovery leaves finished sessions with the second holder."""

    async def nothing(*_: object) -> None:
        return None

    recovery._release_ended = nothing  # type: ignore[assignment]


MUTANTS: dict[Callable[[], None], tuple[str, ...]] = {
    blind_redo: ("update/1/reboot:after_intent", "vm0.1/create:after_call", "luod/load:after_call"),
    no_second_holder: ("vm0.1/hand:before_intent", "vm0.1/retrieve:after_call"),
    never_waits_for_the_silent: ("vm0.1/mark:after_outcome", "vm0.1/create:after_call"),
    keeps_what_has_ended: ("vm0.1/release:before_intent",),
}


@pytest.mark.parametrize("mutant", list(MUTANTS), ids=lambda mutant: mutant.__name__)
def test_a_broken_luod_is_caught(
    mutant: Callable[[], None], disk_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each mutant lives in the processes of its runs only; the sweep must fail at least one of its points."""
    monkeypatch.setattr("luod.demo.host.PATIENCE_S", 10.0)
    monkeypatch.setattr("luod.demo.client.PATIENCE_S", 10.0)

    def broken(directory: Path, setting: Setting) -> Verdict:
        mutant()
        return verdict_of(directory, setting)

    settings = [replace(SMALL, kill_at=point) for point in MUTANTS[mutant]]
    verdicts = list(sweep(disk_path, settings, 2, run=broken))
    assert any(one.problems for one in verdicts), f"{mutant.__doc__} and nobody noticed: {verdicts}"
