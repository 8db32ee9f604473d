# SPDX-License-Identifier: Apache-2.0
"""The harness side of an emulator: what stands for the power button, the debugger and the bystander who survives a reboot.

One connection, JSON lines. A process that talks only to this socket is no part of the emulated world.
"""

from __future__ import annotations

import base64
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from . import wire


class Control:
    """A client of D/control. Every refusal is an OSError with the errno of the emulated kernel."""

    def __init__(self, directory: Path, *, timeout: float | None = None) -> None:
        self._take(wire.connect(directory, wire.CONTROL_SOCKET, socket.SOCK_STREAM), timeout)

    @classmethod
    def on(cls, fd: int) -> Control:
        """Return the client of a connection that `detach` gave away; the fd is the client's from now on."""
        made = cls.__new__(cls)
        made._take(socket.socket(fileno=fd), None)
        return made

    def _take(self, sock: socket.socket, timeout: float | None) -> None:
        self._sock = sock
        self._sock.settimeout(timeout)
        self._buffer = b""

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def detach(self) -> int:
        """Give the connection away, as an fd that is readable once an answer is there."""
        return self._sock.detach()

    def call(self, op: str, fds: list[int] | None = None, **fields: object) -> dict[str, Any]:
        """Send one request and return its answer. TimeoutError after the timeout of the connection."""
        self.ask(op, fds, **fields)
        return self.answer()

    def ask(self, op: str, fds: list[int] | None = None, **fields: object) -> None:
        """Send one request."""
        line = msgspec.json.encode({"op": op, **fields}) + b"\n"
        sent = self._sock.sendmsg(
            [line],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"".join(fd.to_bytes(4, "little") for fd in fds))]
            if fds
            else [],
            socket.MSG_NOSIGNAL,
        )
        if sent < len(line):
            self._sock.sendall(line[sent:])

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer and return it."""
        while b"\n" not in self._buffer:
            data = self._sock.recv(1 << 16)
            if not data:
                raise ConnectionResetError(104, "the emulator has hung up")
            self._buffer += data
        answer, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = msgspec.json.decode(answer)
        if "errno" in reply:
            code = int(reply["errno"])
            raise OSError(code, reply.get("message") or os.strerror(code))
        return reply

    def boot_id(self) -> str:
        """Return the boot id. OSError EHOSTDOWN when the kernel has panicked."""
        return str(self.call("BOOT_ID")["boot_id"])

    def kexec_file_load(self, kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int) -> None:
        """Load the next kernel, or unload it."""
        fds = [fd for fd in (kernel_fd, initrd_fd) if fd >= 0]
        for fd in fds:
            os.fstat(fd)
        self.call(
            "KEXEC_LOAD",
            fds,
            kernel=kernel_fd >= 0,
            initrd=initrd_fd >= 0,
            cmdline=base64.b64encode(cmdline).decode("ascii"),
            flags=flags,
        )

    def kexec_load_legacy(self, kernel_fd: int, cmdline: str) -> None:
        """Load as the old kexec_load(2) does: the jump works and every session is lost."""
        self.call("KEXEC_LOAD_LEGACY", [kernel_fd], cmdline=cmdline)

    def kexec_loaded(self) -> bool:
        """Whether an image is loaded."""
        return bool(self.call("KEXEC_LOADED")["loaded"])

    def kexec(self) -> str:
        """reboot(KEXEC), asked for from outside of the world; returns the boot id of the new kernel."""
        return str(self.call("REBOOT_KEXEC")["boot_id"])

    def cold_reboot(self, *, image: Path | None = None, cmdline: str | None = None) -> str:
        """Cut the power and boot again: by default the kernel and the command line of the first boot. Returns the new boot id."""
        if image is None:
            return str(self.call("COLD_REBOOT", cmdline=cmdline)["boot_id"])
        with open(image, "rb") as file:
            return str(self.call("COLD_REBOOT", [file.fileno()], cmdline=cmdline)["boot_id"])

    def wait_boot(self, boot_id: str) -> str:
        """Wait until the boot id is another than `boot_id` and return it. OSError EHOSTDOWN if the new kernel panics."""
        return str(self.call("WAIT_BOOT", boot_id=boot_id)["boot_id"])

    def attach(self, pid: int) -> None:
        """Make a process, with all its descendants, part of the world: a reboot kills it."""
        self.call("ATTACH", pid=pid)

    def spare(self, pid: int) -> None:
        """Let a process outlive every reboot although it calls the kernel: its session fds die, it does not.

        For harnesses that drive the kernel from within a test process.
        """
        self.call("SPARE", pid=pid)

    def bind(self, device: str, driver: str, *, at_boot: bool = False) -> None:
        """Bind a device to a driver (empty for none), now or from the next boot on. OSError ENODEV, or EBUSY while it is in use."""
        self.call("BIND", device=device, driver=driver, at_boot=at_boot)

    def speaks_proposed(self) -> bool:
        """Whether iommufds of the running kernel know the ioctls of `adapters.proposed`."""
        return bool(self.call("SPEAKS_PROPOSED")["speaks"])

    def state(self) -> dict[str, Any]:
        """Return all there is to see: boot, sessions with their files, members of the world, notes, deviations, faults."""
        return self.call("STATE")

    def audit(self) -> list[dict[str, Any]]:
        """Return every state-changing call that succeeded, in order, over all boots: boot, op, session, token, pid."""
        return list(self.call("AUDIT")["calls"])

    def inject(
        self,
        at: str,
        *,
        errno: int = 0,
        op: str | None = None,
        session: str | None = None,
        token: int | None = None,
        skip: int = 0,
        times: int = 1,
    ) -> int:
        """Order a fault (see `faults`) and return its number."""
        reply = self.call(
            "INJECT",
            at=at,
            errno=errno,
            op_name=op,
            session=session,
            token=None if token is None else f"{token:#x}",
            skip=skip,
            times=times,
        )
        return int(reply["fault"])

    def wait_hit(self, fault: int) -> None:
        """Wait until the fault has struck, and for one that holds: until a call is held."""
        self.call("WAIT_HIT", fault=fault)

    def release(self, fault: int) -> None:
        """Let go what the fault holds, and end the order."""
        self.call("RELEASE", fault=fault)

    def clear_faults(self) -> None:
        """End all orders and let go what they hold."""
        self.call("CLEAR")

    def shutdown(self) -> None:
        """End the emulator process. Processes of the world are left alone; their session fds are dead."""
        self.call("SHUTDOWN")
