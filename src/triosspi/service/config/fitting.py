"""What of the settings will not be as they say, for what the system lets this program have."""

# A connection is a descriptor. Where the limit on descriptors comes before `max_connections`, that cap is never met: accept(2)
# fails instead, and with it everything else that opens a file, the account file and the keytab included. So the program
# takes the limit that it may have, cuts the cap to what fits, and says so.

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from .settings import Limits, Settings
from .system import longest_backlog

#: Descriptors that a process needs beside its connections: two for each of the 40 threads that may look at keytabs, account
#: files and replay caches at the same time, 32 for who asks for metrics, 16 for sockets, event loops and what they wake with.
RESERVED: Final = 128

#: What there is to say where `proxy_from` is given, and all sockets are unix sockets.
UNPROXIED: Final = (
    "proxy_from has no effect: it is about addresses, and only unix sockets are listened on; set proxy_unix, if whoever "
    "connects to them is a proxy"
)


def fitted(limits: Limits, descriptors: int | None) -> Limits:
    """The limits of one process, with no more connections than it has descriptors for.

    Args:
      limits: of this process: its share, where there are workers.
      descriptors: how many files it may open; None: as many as it likes.
    """
    if descriptors is None or limits.max_connections <= (room := _room(descriptors)):
        return limits
    return msgspec.structs.replace(limits, max_connections=room)


def misfits(settings: Settings, descriptors: int | None) -> Iterator[str]:
    """What of the settings will not be as they say, each in one line.

    Args:
      settings: of all workers together.
      descriptors: how many files a process may open; None: as many as it likes.
    """
    workers = settings.workers.workers
    wanted = settings.limits.max_connections
    share = -(-wanted // workers)
    if descriptors is not None and share > (room := _room(descriptors)):
        each = f" in each of {workers} workers" if workers > 1 else ""
        yield (
            f"max_connections = {wanted} does not fit: a process may open {descriptors} files, and at most {room} "
            f"connections are taken{each}; raise the limit (LimitNOFILE=, ulimit -n) to {share + RESERVED}, "
            "or lower max_connections"
        )
    backlog, most = settings.listen.backlog, longest_backlog()
    if backlog is not None and most is not None and backlog > most:
        yield f"backlog = {backlog} does not fit: the kernel lets {most} wait; raise net.core.somaxconn, or lower backlog"
    listen, connections = settings.listen, settings.connections
    if connections.proxy_from and not connections.proxy_unix and listen.unix and not listen.hosts:
        yield UNPROXIED


def _room(descriptors: int) -> int:
    # Where there are so few that nothing is left, half of them: some connections are better than none.
    return max(1, descriptors - RESERVED, descriptors // 2 if descriptors < 2 * RESERVED else 0)
