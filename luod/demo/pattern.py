# SPDX-License-Identifier: Apache-2.0
"""Memory that can be checked: every byte follows from the client's id and its place."""

from __future__ import annotations

import hashlib
import mmap
import random

BLOCK = 1 << 20


def _block(seed: str, number: int, size: int) -> bytes:
    return random.Random(f"{seed}/{number}").randbytes(size)


def fill(memory: mmap.mmap, seed: str) -> str:
    """Fill `memory` with the pattern of `seed`; return its checksum (blake2b-16, hex)."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(memory), BLOCK):
        block = _block(seed, start // BLOCK, min(BLOCK, len(memory) - start))
        memory[start : start + len(block)] = block
        digest.update(block)
    return digest.hexdigest()


def verify(memory: mmap.mmap, seed: str) -> int:
    """Compare every byte of `memory` with the pattern; return how many bytes are right from the start on."""
    for start in range(0, len(memory), BLOCK):
        block = _block(seed, start // BLOCK, min(BLOCK, len(memory) - start))
        found = memory[start : start + len(block)]
        if found != block:
            return start + next(at for at, (a, b) in enumerate(zip(found, block, strict=True)) if a != b)
    return len(memory)
