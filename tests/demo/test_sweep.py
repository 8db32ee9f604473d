# SPDX-License-Identifier: Apache-2.0
"""luod is killed at every point of a whole update, and broken luods are caught by the same sweep."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

from luod.daemon import effects, gate
from luod.demo.command import at_point
from luod.demo.outcome import Setting
from luod.demo.sweep import Verdict, all_settings, one_run, sweep, twice, verdict_of
from luod.engine import runner
from luod.engine.ports import Intent
from luod.engine.reconcile import Action
from luod.states.fold import Session

SMALL = Setting(sessions=2, size=64 << 10)
pytestmark = pytest.mark.timeout(300)


def test_every_crash_point(disk_path: Path) -> None:
    """The same sweep as `luoctl demo --crash all`, and a sample of those that kill luod once more while it recovers."""
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
    for boot in (1, 2):
        assert f"{boot}:vm0.1/hand:after_call" in {setting.point for setting in settings}
    verdicts = list(sweep(disk_path, settings, os.cpu_count() or 2))
    assert [(one.point, one.problems) for one in verdicts if one.problems] == []
    assert {one.ending for one in verdicts} == {"done", "aborted"}
    assert all(one.restarts == 1 for one in verdicts)
    assert all(one.bytes_verified == SMALL.sessions * SMALL.size for one in verdicts)
    again = twice(settings, verdicts)
    assert len(again) > 10 * len(settings)
    verdicts = list(sweep(disk_path / "twice", again[:: len(again) // 24], os.cpu_count() or 2))
    assert [(one.point, one.problems) for one in verdicts if one.problems] == []
    assert {one.restarts for one in verdicts} >= {2}


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
    """Sessions are made and retrieved by luod itself, and nobody else holds them."""

    def create(self: effects.Create, intent: Intent) -> dict[str, Any]:
        self.held.put(intent.args["name"], self.kernel.create_session(intent.args["name"]))
        return {}

    def retrieve(self: effects.Retrieve, intent: Intent) -> dict[str, Any]:
        self.held.put(intent.args["name"], self.kernel.retrieve_session(intent.args["name"]))
        return {}

    effects.Create.apply = create  # type: ignore[method-assign]
    effects.Retrieve.apply = retrieve  # type: ignore[method-assign]


def never_waits_for_the_silent() -> None:
    """An update goes on without clients whose connection has died with luod."""
    honest = gate.Gate.participants

    def participants(self: gate.Gate, update: str, *among: Sequence[str]) -> list[Session]:
        return [one for one in honest(self, update, *among) if one.update == update]

    gate.Gate.participants = participants  # type: ignore[method-assign]


def lets_go_of_nothing() -> None:
    """Finished sessions stay with the second holder, whatever the journal says."""
    effects.Release.apply = lambda self, intent: {}  # type: ignore[method-assign]


class Broken(NamedTuple):
    """A broken luod: where to kill it, and what the sweep must say then."""

    mutant: Callable[[], None]
    points: tuple[str, ...]
    verdict: str


BROKEN = [
    Broken(
        blind_redo,
        ("1:update/1/reboot:after_intent", "1:luod/load:after_call"),
        "KEXEC_LOAD .* twice in boot 1",
    ),
    Broken(
        no_second_holder,
        ("2:vm0.1/retrieve:after_outcome", "2:vm0.1/hand:after_call"),
        "LOST|lost|client/vm0 ended",
    ),
    Broken(
        never_waits_for_the_silent,
        ("1:vm0.1/mark:after_outcome", "1:vm0.1/create:after_call"),
        "client/vm. ended|luod ended with 1",
    ),
    Broken(lets_go_of_nothing, ("2:vm0.1/release:before_intent",), "the kernel still holds luod.vm0.1"),
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.mutant.__name__)
def test_a_broken_luod_is_caught(broken: Broken, disk_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mutant lives in the processes of its runs only; the sweep must say what is wrong with it."""
    monkeypatch.setattr("luod.demo.host.PATIENCE_S", 10.0)
    monkeypatch.setattr("luod.demo.client.PATIENCE_S", 10.0)

    def run(directory: Path, setting: Setting) -> Verdict:
        broken.mutant()
        return verdict_of(directory, setting)

    verdicts = list(sweep(disk_path, [at_point(SMALL, point) for point in broken.points], 2, run=run))
    assert not [one for one in verdicts if one.ending == "crashed"], "the mutant itself must work"
    said = [problem for one in verdicts for problem in one.problems]
    assert any(re.search(broken.verdict, problem, re.DOTALL) for problem in said), (
        f"{broken.mutant.__doc__} The sweep says only: {said}"
    )


def test_a_run_that_dies_is_no_success(disk_path: Path) -> None:
    def run(directory: Path, setting: Setting) -> Verdict:
        raise ValueError("the harness is broken")

    (verdict,) = sweep(disk_path, [SMALL], 1, run=run)
    assert verdict.ending == "crashed"
    assert verdict.problems
    assert "the harness is broken" in (Path(verdict.directory) / "harness.log").read_text()
