"""NegotiateStream for `load.py`: a connection that is a byte stream, of which a message is a write and its echo."""

# The client is our own `StreamSession`, which is what `open_negotiate_stream` has beneath Trio. Over Trio it would cost as
# much as our server does, and be the limit.
#
# What is echoed may come in other records than it was sent in: .NET answers each record by one, our server all that was at
# hand by as few as hold it. So the length of a reply on the wire is not known, and each record's is read.

import os
import socket

from load import Connection, Wire
from triosspi import Initiator
from triosspi.session import StreamSession

_LENGTH_SIZE = 4


class StreamConnection(Connection):
    """A logged-in connection of NegotiateStream. One byte has been echoed: from it the size of a trailer is known.

    Args:
        sock: Connected, and blocking still.
        credential: What to log in with.
    """

    __slots__ = ("_left", "_length", "_session", "_trailer_size")

    def __init__(self, sock: socket.socket, credential: Initiator) -> None:
        self._session = session = StreamSession(credential)
        super().__init__(sock, Wire(0, lambda messages: b"".join(map(session.seal_checked, messages)), list))
        self._length = b""  # of the next record, as far as it has come
        self._left = 0  # bytes of this record that have not come
        self._log_in()
        sealed = session.seal_checked(b"\0")
        self._trailer_size = len(sealed) - _LENGTH_SIZE - 1
        sock.sendall(sealed)
        while not session.next_opened():
            self._feed()

    def _feed(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionError("the server has closed during the login")
        self._session.receive_data(data)

    def _log_in(self) -> None:
        session = self._session
        token = None
        while True:
            self.sock.sendall(session.step(token))
            if session.established:
                return
            while (token := session.next_token()) is None:
                self._feed()

    def count(self, data: memoryview) -> int:
        """See `Connection.count`: a record's data counts when all of it has come."""
        at, counted = 0, 0
        while at < len(data):
            if not self._left:
                part = data[at : at + _LENGTH_SIZE - len(self._length)]
                self._length += part
                at += len(part)
                if len(self._length) == _LENGTH_SIZE:
                    self._left = int.from_bytes(self._length, "little")
                continue
            step = min(self._left, len(data) - at)
            at += step
            self._left -= step
            if not self._left:
                counted += int.from_bytes(self._length, "little") - self._trailer_size
                self._length = b""
        return counted

    def check(self, data: bytes) -> None:
        """See `Connection.check`."""
        self._session.receive_data(data)
        self.rest += self._session.next_opened()
        while self.expected and len(self.rest) >= len(self.expected[0]):
            message = self.expected.popleft()
            if not self.rest.startswith(message):
                raise AssertionError("a reply is not what was sent")
            self.rest = self.rest[len(message) :]


def connect_streams(port: int, wire: str, number: int) -> list[Connection]:
    """See `load.connect`."""
    if wire == "ntlm-stream":
        credential = Initiator(username="DOM\\alice", password=os.environ["BENCH_PASSWORD"], mechanism="ntlm")
    else:
        credential = Initiator(target=os.environ["BENCH_TARGET"], mechanism="kerberos")
    connections: list[Connection] = []
    for _ in range(number):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connections.append(StreamConnection(sock, credential))
        sock.setblocking(False)
    return connections
