# SPDX-License-Identifier: Apache-2.0
"""The init of a lab guest: process 1, straight from the kernel command line.

    init=/path/to/python ... -- -I -S -B /path/to/guest.py

It mounts what a Linux program expects, opens the result port, reads the script from the state disk, carries out the steps of this
boot and powers off. Which boot this is, it counts on the state disk itself, so a kexec into the same init continues with the next
boot of the script no matter who built the command line. A boot may have another process 1 (`luod.lab.systemd`): then this one makes the
file tree ready, becomes that program, and the steps are a service of it, `guest.py steps`.

The root is the host's own file tree by 9p, read-only: every import costs round trips, so this file uses the standard library only and
never imports luod. Steps run as child processes; they write more result lines with `LUOD_LAB_REPORT_FD`, an inherited descriptor of
the port (one write of a whole line of at most 32 KiB is one message there).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

STATE = "/run/state"
LAB = f"{STATE}/lab"
BOOTS = f"{LAB}/boots"
HOST = "/run/host"
PORT_NAME = "luod.lab"
REPORT_VARIABLE = "LUOD_LAB_REPORT_FD"
OUTPUT_TAIL = 6000
"""Bytes of a step's output that travel in its result line; the whole is in a file on the state disk."""
READ_ONLY, BIND, NO_DEV_EXEC = 1, 4096, 2 | 4 | 8
POWER_OFF = 0x4321FEDC

Json = dict[str, Any]
libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Mount, making the mount point where that is possible. Raises OSError."""
    with contextlib.suppress(OSError):
        os.makedirs(target, exist_ok=True)
    if libc.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode() or None
    ):
        code = ctypes.get_errno()
        raise OSError(code, f"mount {kind or 'bind'} {source} on {target}: {os.strerror(code)}")


def set_up_mounts() -> None:
    """Mount the kernel's file systems and memory-backed /run and /tmp over the read-only root, and the state disk."""
    mount("proc", "/proc", "proc", NO_DEV_EXEC)
    mount("sysfs", "/sys", "sysfs", NO_DEV_EXEC)
    if not os.path.exists("/dev/kmsg"):
        mount("devtmpfs", "/dev", "devtmpfs")
    mount("devpts", "/dev/pts", "devpts")
    mount("shm", "/dev/shm", "tmpfs", 0, "mode=1777")
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", NO_DEV_EXEC)
    mount("debugfs", "/sys/kernel/debug", "debugfs")
    with open("/sys/fs/cgroup/cgroup.subtree_control", "w") as file:
        file.write("+memory +pids")
    mount("run", "/run", "tmpfs", 0, "mode=755")
    mount("/", HOST, flags=BIND)
    mount("tmp", "/tmp", "tmpfs", 0, "mode=1777")
    mount("/dev/vda", STATE, "ext4")
    os.makedirs(LAB, exist_ok=True)


def show_again(paths: list[str]) -> None:
    """Make host files and directories visible that the mounts over /tmp and /run have covered."""
    for path in paths:
        if not os.path.isdir(f"{HOST}{path}"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_CLOEXEC))
        mount(f"{HOST}{path}", path, flags=BIND)


def become_init(init: Json) -> NoReturn:
    """Make the file tree ready for another process 1, and become it. Raises OSError."""
    for number, path in enumerate(init["layered"]):
        layer = f"/run/layers/{number}"
        os.makedirs(f"{layer}/upper")
        os.makedirs(f"{layer}/work")
        mount("layer", path, "overlay", 0, f"lowerdir={path},upperdir={layer}/upper,workdir={layer}/work")
    for path in init["empty"]:
        mount("empty", path, "tmpfs", 0, "mode=755")
    for path, place in init["kept"].items():
        os.makedirs(place, exist_ok=True)
        mount(place, path, flags=BIND)
    for file in init["files"]:
        os.makedirs(os.path.dirname(file["path"]), exist_ok=True)
        fd = os.open(file["path"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, file["mode"])
        os.write(fd, file["text"].encode())
        os.close(fd)
    for path, target in init["links"].items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(target, path)
    os.execv(init["argv"][0], init["argv"])


def open_port() -> int:
    """Open the virtio-serial port of the lab by its name; there is no udev to name its node."""
    base = "/sys/class/virtio-ports"
    for entry in sorted(os.listdir(base)):
        with open(f"{base}/{entry}/name") as file:
            if file.read().strip() == PORT_NAME:
                return os.open(f"/dev/{entry}", os.O_WRONLY | os.O_CLOEXEC)
    raise FileNotFoundError(f"no virtio port {PORT_NAME}")


def boots_begun() -> int:
    """Return how many boots of the run have been counted."""
    with contextlib.suppress(FileNotFoundError), open(BOOTS) as file:
        return int(file.read() or 0)
    return 0


def count_boot() -> int:
    """Return the number of this boot in the run, from 0, and note on the state disk that it has begun."""
    number = boots_begun()
    fd = os.open(BOOTS, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.write(fd, str(number + 1).encode())
    os.fsync(fd)
    os.close(fd)
    return number


class Guest:
    """One boot: its place in the script, the report port and the children that run."""

    def __init__(self, port: int, script: Json, boot: int) -> None:
        self.port = port
        self.script = script
        self.boot = boot
        self.step = "start-up"
        self.background: dict[str, tuple[int, int]] = {}
        """Name -> (pid, pidfd) of the processes that `start` steps have left running."""
        self.ended: dict[int, int] = {}
        """Pid -> wait status of children that process 1 has reaped while waiting for something else."""

    def report(self, event: str, **fields: Any) -> None:
        """Send one result line."""
        line = json.dumps(
            {"event": event, "boot": self.boot, "uptime": round(time.clock_gettime(7), 3), **fields}
        )
        os.write(self.port, line.encode() + b"\n")

    def run(self) -> NoReturn:
        """Carry out the steps of this boot, then power off."""
        release = os.uname().release
        with open("/proc/cmdline") as file:
            cmdline = file.read().strip()
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot_id = file.read().strip()
        handover = os.path.isdir("/sys/kernel/debug/kho/in")
        self.report("boot", kernel=release, boot_id=boot_id, handover=handover, cmdline=cmdline)
        boots = self.script["boots"]
        ok = self.boot < len(boots)
        if not ok:
            self.report(
                "fail", step="start-up", message=f"the script has {len(boots)} boots, this is one more"
            )
        else:
            for step in boots[self.boot]["steps"]:
                self.step = step["name"]
                if not self.carry_out(step) and not step.get("go_on"):
                    ok = False
                    break
        self.leave("end", ok=ok)
        os.kill(-1, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
        os.sync()
        libc.umount2(STATE.encode(), 0)
        libc.reboot(ctypes.c_int(POWER_OFF))
        raise SystemExit("reboot(2) came back")

    def leave(self, event: str, **fields: Any) -> None:
        """Save the kernel log of this boot and say that the boot may end from here on."""
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        with open(f"{LAB}/dmesg-{self.boot}.txt", "wb") as file:
            while True:
                try:
                    record = os.read(log, 8192)
                except BlockingIOError:
                    break
                except (
                    BrokenPipeError
                ):  # the ring wrapped around while reading: the next read goes on after the gap
                    continue
                prefix, _, text = record.partition(b";")
                micro = int(prefix.split(b",")[2])
                file.write(b"[%5d.%06d] " % divmod(micro, 1_000_000) + text.split(b"\n", 1)[0] + b"\n")
        os.close(log)
        self.report(event, step=self.step, **fields)

    # -- steps -----------------------------------------------------------------------------------------------------------------

    def carry_out(self, step: Json) -> bool:
        """Do one step and report it; True when it went as the script wants."""
        self.report("begin", step=step["name"], kind=step["kind"])
        began = time.monotonic()
        try:
            outcome = getattr(self, f"do_{step['kind']}")(step)
        except Exception as error:
            outcome = {"ok": False, "message": f"{type(error).__name__}: {error}"}
        self.report(
            "step",
            step=step["name"],
            kind=step["kind"],
            seconds=round(time.monotonic() - began, 3),
            **outcome,
        )
        self.reap()
        return bool(outcome["ok"])

    def do_run(self, step: Json) -> Json:
        """Run a process to its end. With `leaves` it is meant never to come back, because it takes the machine down."""
        pid, pidfd = self.spawn(step)
        if step.get("leaves"):
            self.leave("leave")
        ended = self.wait_for(pidfd, step["timeout_s"])
        if not ended:
            os.killpg(pid, signal.SIGKILL)
        code = self.collect(pid, pidfd)
        wanted = code in step["codes"] and not step.get("leaves")
        result = {"ok": ended and wanted, "code": code, "output": self.tail(step["name"])}
        if not ended:
            result["message"] = f"still running after {step['timeout_s']} s, killed"
        elif step.get("leaves"):
            result["message"] = "came back instead of leaving this boot"
        return result

    def do_start(self, step: Json) -> Json:
        """Start a process that stays, and wait until it is ready if it says so: READY=1 on NOTIFY_SOCKET, or a byte on `ready_fd`."""
        name = step["name"]
        if step.get("ready_fd"):
            hear, tell = os.pipe()
            self.background[name] = pid, pidfd = self.spawn(step, ready=tell)
            os.close(tell)
            outcome = self.await_ready(step, hear, pidfd, lambda: bool(os.read(hear, 1)))
            os.close(hear)
        elif step.get("ready"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                address = f"/run/notify-{name}"
                notify.bind(address)
                os.chmod(address, 0o666)
                self.background[name] = pid, pidfd = self.spawn(step, {"NOTIFY_SOCKET": address})
                outcome = self.await_ready(
                    step, notify.fileno(), pidfd, lambda: b"READY=1" in notify.recv(4096).split(b"\n")
                )
        else:
            self.background[name] = self.spawn(step)
            return {"ok": True}
        if outcome == "ready":
            return {"ok": True}
        if outcome == "ended":
            del self.background[name]
            code = self.collect(pid, pidfd)
            return {
                "ok": False,
                "code": code,
                "output": self.tail(name),
                "message": "ended before it was ready",
            }
        return {"ok": False, "output": self.tail(name), "message": f"not ready after {step['timeout_s']} s"}

    def await_ready(self, step: Json, fd: int, pidfd: int, said: Callable[[], bool]) -> str:
        """Wait for a word on `fd` that means ready, for the end of the process, or for the time limit: "ready", "ended", "late"."""
        deadline = time.monotonic() + step["timeout_s"]
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            heard = {each for each, _ in poll.poll(left * 1000)}
            if fd in heard and said():
                return "ready"
            if pidfd in heard:
                return "ended"
        return "late"

    def do_signal(self, step: Json) -> Json:
        """Send a signal to a started process."""
        signal.pidfd_send_signal(self.background[step["target"]][1], step["signal"])
        return {"ok": True}

    def do_wait(self, step: Json) -> Json:
        """Wait until a started process ends."""
        pid, pidfd = self.background.pop(step["target"])
        if not self.wait_for(pidfd, step["timeout_s"]):
            self.background[step["target"]] = (pid, pidfd)
            return {
                "ok": False,
                "output": self.tail(step["target"]),
                "message": f"still running after {step['timeout_s']} s",
            }
        code = self.collect(pid, pidfd)
        return {"ok": code in step["codes"], "code": code, "output": self.tail(step["target"])}

    def do_cut(self, step: Json) -> Json:
        """Ask the host to cut the power, and wait for it: nothing is synced, no process is told."""
        self.leave("cut")
        select.select([], [], [], step["timeout_s"])
        return {"ok": False, "message": "the host did not cut the power"}

    # -- processes -------------------------------------------------------------------------------------------------------------

    def output_path(self, name: str) -> str:
        """Return where a step's output goes."""
        return f"{LAB}/{self.boot}-{name}.out"

    def tail(self, name: str) -> str:
        """Return the end of a step's output."""
        with contextlib.suppress(OSError), open(self.output_path(name), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - OUTPUT_TAIL))
            return file.read().decode("utf-8", "replace")
        return ""

    def spawn(self, step: Json, more: dict[str, str] | None = None, ready: int = -1) -> tuple[int, int]:
        """Start a step's process in a session (and, if wanted, a cgroup and a user) of its own; its output goes to the state disk."""
        environment = {**self.script["environment"], **step.get("environment", {}), **(more or {})}
        environment |= {REPORT_VARIABLE: "3", "LUOD_LAB_BOOT": str(self.boot), "LUOD_LAB_STATE": STATE}
        output = os.open(self.output_path(step["name"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        pid = os.fork()
        if pid == 0:
            try:
                self.become(step, output, ready)
                os.execve(step["argv"][0], step["argv"], environment)
            except BaseException as error:
                os.write(2, f"cannot start {step['argv']}: {error}\n".encode())
            finally:
                os._exit(127)
        os.close(output)
        return pid, os.pidfd_open(pid)

    def become(self, step: Json, output: int, ready: int) -> None:
        """Turn a fresh child into what the step wants, up to its exec."""
        os.setsid()
        null = os.open("/dev/null", os.O_RDONLY)
        port = os.dup(self.port)
        for source, target in ((null, 0), (output, 1), (output, 2), (port, 3)):
            os.dup2(source, target)
        if ready >= 0:
            os.dup2(ready, step["ready_fd"])
        os.chdir(step.get("directory") or "/")
        if step.get("cgroup"):
            group = f"/sys/fs/cgroup/{step['cgroup']}"
            os.makedirs(group, exist_ok=True)
            with open(f"{group}/cgroup.procs", "w") as file:
                file.write("0")
        if step.get("uid"):
            os.setgroups([])
            os.setresgid(step["uid"], step["uid"], step["uid"])
            os.setresuid(step["uid"], step["uid"], step["uid"])

    def wait_for(self, pidfd: int, timeout_s: float) -> bool:
        """Wait for the end of a process; False when the time is over first."""
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def collect(self, pid: int, pidfd: int) -> int:
        """Return the exit code of a child (negative: the signal that ended it)."""
        os.close(pidfd)
        status = self.ended.pop(pid, None)
        if status is None:
            _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)

    def reap(self) -> None:
        """Take in orphans that ended, and remember the ends of background children for their `wait`."""
        known = {pid for pid, _ in self.background.values()}
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid in known:
                    self.ended[pid] = status


def main() -> NoReturn:
    """Be the init, or the steps of a boot that has another one."""
    steps_only = sys.argv[1:] == ["steps"]
    if not steps_only:
        set_up_mounts()
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 524288))
    boot = boots_begun() - 1 if steps_only else count_boot()
    with open(f"{LAB}/script.json", encoding="utf-8") as file:
        script = json.load(file)
    port = open_port()
    guest = Guest(port, script, boot)
    try:
        if not steps_only:
            show_again(script["show"])
            init = script["boots"][boot].get("init") if boot < len(script["boots"]) else None
            if init:
                become_init(init)
        guest.run()
    except BaseException as error:
        guest.report("fail", step=guest.step, message=f"init: {type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    if os.getpid() != 1 and sys.argv[1:] != ["steps"]:
        sys.exit("guest.py is the init of a lab machine: boot it with luod.lab.machine")
    main()
