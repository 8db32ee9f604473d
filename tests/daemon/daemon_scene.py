# SPDX-License-Identifier: Apache-2.0
"""A host in a play: its clients by name, its operator, and the steps that most scenarios have in common."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from luod_world import PATIENCE_S, Puppet, World

from luod.adapters.keeper.client import Keeper
from luod.client import Client, ClientError
from luod.states.names import BLACK_BOX_SESSION

TOKEN = 0x1A


class Actor(Puppet):
    """A client in its own process, with the id that it speaks for."""

    def __init__(self, world: World, name: str, uid: int = 0) -> None:
        super().__init__(world, uid)
        self.name = name
        world.control.attach(self.pid)

    def subscribe(self, **more: object) -> dict[str, Any]:
        return self.call("SUBSCRIBE", id=self.name, **more)

    def start(self) -> dict[str, Any]:
        """Take the session, and preserve a memfd that holds this client's name."""
        event = self.event("START_PRESERVATION")
        self.preserve(TOKEN, self.name)
        return event

    def say(self, cmd: str, **fields: object) -> dict[str, Any]:
        return self.call(cmd, id=self.name, **fields)

    def refused(self, cmd: str, **fields: object) -> ClientError:
        with pytest.raises(ClientError) as caught:
            self.say(cmd, **fields)
        return caught.value

    def last_word(self) -> None:
        """Say READY; the kexec may be quicker than the reply."""
        self.ask("post", cmd="READY", id=self.name)

    def let_go(self) -> str:
        """Do as an ABORT says; return its reason."""
        reason = str(self.event("ABORT")["reason"])
        self.drop()
        self.say("ABORTED")
        return reason

    def restore(self) -> None:
        """Find the memfd as it was."""
        assert self.retrieve(TOKEN) == self.name

    def finish_and_say(self) -> None:
        self.finish()
        assert self.say("FINISHED")["state"] == "finished"


class Scene:
    """One host. Its clients are ended with it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.control = world.control
        self._stack = contextlib.ExitStack()
        self._cast: list[Actor] = []

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *why: Any) -> None:
        self.control.clear_faults()
        self._stack.close()

    # -- clients

    def actor(self, name: str, uid: int = 0) -> Actor:
        made = self._stack.enter_context(Actor(self.world, name, uid))
        self._cast.append(made)
        return made

    def join(self, *names: str, uid: int = 0, **more: object) -> list[Actor]:
        """Start clients and let each subscribe."""
        cast = [self.actor(name, uid) for name in names]
        for actor in cast:
            actor.subscribe(**more)
        return cast

    # -- the operator

    @contextlib.contextmanager
    def admin(self) -> Iterator[Client]:
        with self.world.client() as link:
            yield link

    def kexec(self, **more: object) -> str:
        with self.admin() as admin:
            self.world.load(admin)
            return str(admin.call("KEXEC", **more).fields["update"])

    def abort(self, name: str | None = None) -> None:
        with self.admin() as admin:
            admin.abort(name)

    def refused(self, cmd: str, **fields: object) -> ClientError:
        with self.admin() as admin, pytest.raises(ClientError) as caught:
            admin.call(cmd, **fields)
        return caught.value

    def status(self) -> dict[str, Any]:
        with self.admin() as admin:
            return admin.status().fields

    def session(self, name: str) -> dict[str, Any]:
        with self.admin() as admin:
            return dict(admin.session(name)["session"])

    def state(self, name: str) -> str:
        return str(self.session(name)["state"])

    def update(self) -> dict[str, Any]:
        return dict(self.status()["update"])

    def types(self, stream: str) -> list[str]:
        """Return what happened in a stream, effects left out."""
        with self.admin() as admin:
            kinds = [str(record["type"]).rpartition(".")[0] for record in admin.records(stream=stream)]
        return [kind.partition(".")[2] for kind in kinds if not kind.startswith("effect.")]

    def wait(self, kind: str, stream: str) -> dict[str, Any]:
        """Wait for a record of `stream` and return its body."""
        return dict(self.world.wait_record(kind, stream)["body"])

    # -- reboots

    def go(self, *actors: Actor) -> None:
        """Take these clients, and all of them, through a kexec into the next boot."""
        self.kexec()
        for actor in actors:
            actor.start()
        for actor in actors:
            actor.last_word()
        self.arrive()

    def arrive(self) -> None:
        """Wait for the kexec and start what init starts."""
        self.world.next_boot(*self.bury_list())

    def bury_list(self) -> list[Actor]:
        cast, self._cast = self._cast, []
        return cast

    def bury(self) -> None:
        """Wait for the death of all that a reboot kills."""
        for program in (self.world.luod, self.world.keeper):
            assert program is not None
            program.wait()
        for actor in self.bury_list():
            actor.buried()

    def power_cut(self, cmdline: str | None = None) -> None:
        """Boot again without handing anything over, and start what init starts."""
        self.control.cold_reboot(cmdline=cmdline)
        self.bury()
        self.world.boot()

    # -- luod

    def keeper(self) -> Keeper:
        return Keeper(self.world.run)

    def trap(self, point: str) -> None:
        """Restart luod so that it kills itself at a crash point."""
        self.world.kill_luod()
        self.world.start_luod("--crash-at", point, "--crash-trace", self.world.dir / "points")

    def sprung(self) -> None:
        """Wait until luod has killed itself, and start it again."""
        assert self.world.luod is not None
        assert self.world.luod.wait() == -signal.SIGKILL
        self.world.start_luod()

    def stop_luod(self) -> None:
        assert self.world.luod is not None
        assert self.world.luod.end(signal.SIGTERM) == 0, self.log()

    def log(self) -> str:
        return self.world.log.read_text(errors="replace")

    def journal(self) -> Path:
        return self.world.state / "journal.db"

    # -- the kernel

    def outgoing(self) -> set[str]:
        """Return the sessions that would be carried, the black box left out."""
        return {one["name"] for one in self.control.state()["outgoing"]} - {BLACK_BOX_SESSION}

    def incoming(self) -> set[str]:
        return {one["name"] for one in self.control.state()["incoming"]} - {BLACK_BOX_SESSION}

    def kept(self) -> set[str]:
        """Return what the second holder has."""
        return set(self.keeper().names())


NewScene = Callable[..., Scene]
"""Makes a host: `new_scene(settings, boot=True)`."""

__all__ = ["PATIENCE_S", "TOKEN", "Actor", "NewScene", "Scene"]
