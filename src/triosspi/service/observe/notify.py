"""What a service tells systemd: that it is ready, stops, reloads, and is alive."""

# The protocol of sd_notify(3): one datagram of `NAME=value` lines to the Unix socket that NOTIFY_SOCKET names. It is 40 lines
# here because there is nothing to depend on: `sdnotify` is long dead (its last release is of 2017), `systemd-python` needs
# libsystemd and a compiler.
#
# Nothing here may hurt the server: no variable, no socket there, a full one, a service manager that has gone: all of it is
# silence, with a line in the log of level debug. And nothing here may be inherited: a child of ours (a worker, or what a handler
# starts) that found NOTIFY_SOCKET would speak in our name, and one that found WATCHDOG_USEC would wait for its own.

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, MutableMapping
from typing import Final, NoReturn

import trio

log = logging.getLogger("triosspi.server")

#: What systemd puts into the environment of the process that it has started, and of no other.
VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
# Seconds that a datagram may wait for room. Losing READY=1 would have the service killed at TimeoutStartSec, so the few
# messages that come once are worth a pause of the event loop; the others are not.
_PATIENCE: Final = 1.0
# systemd shows a status in one line; a datagram has bounds too.
_LONGEST_STATUS: Final = 400


class Notifier:
    """The service manager, if there is one; otherwise every method does nothing.

    Args:
      address: of its socket: a path, or ``@name`` in Linux's abstract namespace; None: there is none.
      watchdog: seconds without `alive` after which it kills the service; None: it does not.

    Attributes:
      watchdog_interval: seconds between two calls of `alive`, half of what is allowed; None: none are expected.
    """

    def __init__(self, address: str | None, watchdog: float | None = None) -> None:
        self._address = address
        self.watchdog_interval = None if watchdog is None or address is None else watchdog / 2

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] | None = None) -> Notifier:
        """The one that the environment names. What names it is taken out, so that children do not inherit it.

        Args:
          environment: by default this process's own.
        """
        if environment is None:
            environment = os.environ
        address, microseconds, pid = (environment.pop(name, "") for name in VARIABLES)
        watchdog = None
        # With another's number it was meant for whoever has started us.
        if microseconds and (not pid or pid == str(os.getpid())):
            try:
                watchdog = int(microseconds) / 1e6
            except ValueError:
                log.debug("WATCHDOG_USEC is no number")
            if watchdog is not None and watchdog <= 0:
                watchdog = None
        return cls(address or None, watchdog)

    def __bool__(self) -> bool:
        return self._address is not None

    def ready(self, status: str | None = None) -> None:
        """The service has started, or has finished reloading."""
        self._tell("READY=1", status=status, patience=_PATIENCE)

    def reloading(self) -> None:
        """The service reads its configuration again; `ready` must follow."""
        # By the time, `Type=notify-reload` knows the answer to its own SIGHUP from one to an earlier.
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", patience=_PATIENCE)

    def stopping(self, status: str | None = None) -> None:
        """The service has begun to stop."""
        self._tell("STOPPING=1", status=status, patience=_PATIENCE)

    def status(self, text: str) -> None:
        """How it is, in one line, for ``systemctl status``."""
        self._tell(status=text)

    def alive(self) -> None:
        """The service is well: do not restart it."""
        self._tell("WATCHDOG=1")

    async def keep_alive(self, well: Callable[[], bool] = lambda: True) -> NoReturn:
        """Call `alive` as often as it is expected, for ever.

        Args:
          well: is asked each time; while it is False nothing is said.
        """
        if self.watchdog_interval is None:
            await trio.sleep_forever()
        while True:
            if well():
                self.alive()
            await trio.sleep(self.watchdog_interval)

    def _tell(self, *lines: str, status: str | None = None, patience: float = 0.0) -> None:
        if self._address is None:
            return
        if status is not None:
            # A line feed would let whoever chose a part of the text say MAINPID= in our name.
            line = "".join(char if char.isprintable() else "?" for char in status[:_LONGEST_STATUS])
            lines = (*lines, f"STATUS={line}")
        address = os.fsencode(self._address)
        if address.startswith(b"@"):
            address = b"\0" + address[1:]
        try:
            # A new one for each message: it costs 10 us, and the server may have given up all of its descriptors since.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(patience)
                sock.sendto("\n".join(lines).encode(errors="replace"), address)
        except (OSError, ValueError, AttributeError) as exc:
            # AttributeError: no such sockets on Windows.
            log.debug("the service manager was not told %s: %s", lines[0], exc)
