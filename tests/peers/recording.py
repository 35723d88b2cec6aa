"""A relay between two foreign peers that keeps every byte of both."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from . import wire


@dataclass(slots=True)
class Conversation:
    """The bytes of one connection, by who said them."""

    client: bytearray = field(default_factory=bytearray)
    server: bytearray = field(default_factory=bytearray)


class RecordingRelay:
    """Listens, and connects each who comes with a port of this machine, until it is left.

    Args:
        target: That port.

    Attributes:
        port: Its own.
        conversations: One for each connection, in their order. To be judged when the relay has been left: before, a
            part of them may still be under way.
    """

    def __init__(self, target: int) -> None:
        self.conversations: list[Conversation] = []
        self._target = target
        self._last: object = None  # the address of the connection that ends it
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, name="relay")]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The last to come, behind everybody whom the relay has not looked at yet: a peer that only speaks may have gone.
        with socket.socket() as last:
            last.bind(("127.0.0.1", 0))
            self._last = last.getsockname()
            last.connect(("127.0.0.1", self.port))
            self._threads[0].join()
        self._listener.close()
        for thread in self._threads[1:]:
            thread.join()

    def _accept(self) -> None:
        while True:
            client, address = self._listener.accept()
            if address == self._last:
                client.close()
                return
            conversation = Conversation()
            self.conversations.append(conversation)
            server = wire.connect("127.0.0.1", self._target)
            client.settimeout(wire.TIMEOUT)
            both = threading.Barrier(2)
            for source, sink, record in (client, server, conversation.client), (server, client, conversation.server):
                thread = threading.Thread(target=self._copy, args=(source, sink, record, both), name="relay")
                thread.start()
                self._threads.append(thread)

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket, record: bytearray, both: threading.Barrier) -> None:
        try:
            with contextlib.suppress(
                OSError
            ):  # a reset is an end, too, and its time-out is the test's failure elsewhere
                while chunk := source.recv(1 << 16):
                    record += chunk
                    sink.sendall(chunk)
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)
        finally:
            # Neither is closed while the other direction still needs it.
            both.wait(2 * wire.TIMEOUT)
            source.close()
