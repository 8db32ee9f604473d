# SPDX-License-Identifier: Apache-2.0
"""The host's end of a Linux guest's network: `linux_host.py PORT COUNT [end]`.

Echoes the numbers that the guest sends until COUNT have come, and then tells it to end, if that is wanted.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys

from luod.lab.report import emit

SIOCSIFFLAGS = 0x8914  # include/uapi/linux/sockios.h
IFF_UP, IFF_RUNNING = 1, 0x40
PATIENCE_S = 580.0


def main() -> int:
    port, count = int(sys.argv[1]), int(sys.argv[2])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP | IFF_RUNNING))
        sock.bind(("127.0.0.1", port))
        sock.settimeout(PATIENCE_S)
        heard: list[int] = []
        while len(heard) < count:
            number, guest = sock.recvfrom(64)
            heard.append(int(number))
            ending = len(heard) == count and sys.argv[3:] == ["end"]
            sock.sendto(b"end" if ending else number, guest)
    emit("heard", first=heard[0], last=heard[-1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
