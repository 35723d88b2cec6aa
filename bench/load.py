r"""The load: many connections to one echo server, each with 1 or 16 messages outstanding.

    python bench/load.py --port PORT --wire plain|tls|ntlm|kerberos|ntlm-stream|kerberos-stream [--connections 64]
                         [--size 32] [--window 16] [--seconds 2] [--verify] [--server-pid PID]

Prints one line of JSON: what the server has echoed, its CPU and latencies, and the load's own CPU, so that one can see
which of the two was the limit. `--commands` reads such runs from standard input, a line of JSON each, and answers each
with a line; the connections stay. A window slides: as many messages as come back are sent at once.

It must be cheaper than any server: one thread on epoll, logins by pyspnego and python-gssapi, then sealing by
`triosspi._sealing` where that is built, else by them. NegotiateStream is in `stream_load`. Replies are counted; with `--verify` each is opened and compared,
byte by byte.

NTLM: the account DOM\\alice, password in BENCH_PASSWORD. Kerberos: the ticket cache of KRB5CCNAME, service in
BENCH_TARGET. TLS: the authority's certificate in BENCH_AUTHORITY. Linux only.
"""

import argparse
import gc
import json
import os
import resource
import select
import socket
import ssl
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import spnego

try:
    from triosspi import _sealing
except ImportError:
    _sealing = None  # type: ignore[assignment]

from baselines.prefixed import join, split

RECEIVE_SIZE = 1 << 18
#: Of a run's seconds, what passes before the measuring.
WARM_UP = 0.2
WIRES = ("plain", "tls", "ntlm", "kerberos", "ntlm-stream", "kerberos-stream")
#: Seconds after which a server is given up.
SILENCE = 30
BLOCKING = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


# ---- what is sent, by wire ----


@dataclass
class Wire:
    """How one connection's messages look on the wire.

    Attributes:
        overhead: Bytes that a message is longer there.
        pack: Messages to bytes to be sent.
        unpack: Frames without their lengths to messages.
    """

    overhead: int
    pack: Callable[[Sequence[bytes]], bytes]
    unpack: Callable[[list[bytes]], list[bytes]]


PLAIN = Wire(4, join, list)


def native_wire(sealer: "_sealing.NTLMSealer | _sealing.KerberosSealer") -> Wire:
    """Sealed by `triosspi._sealing`."""

    def unpack(frames: list[bytes]) -> list[bytes]:
        messages, error = sealer.open_frames(frames)
        if error is not None:
            raise error
        return messages

    return Wire(8 + sealer.trailer_size, sealer.seal_frames, unpack)


def slow_wire(trailer_size: int, seal: Callable[[bytes], bytes], unseal: Callable[[bytes], bytes]) -> Wire:
    """Sealed by pyspnego or python-gssapi, one by one."""
    prefix = struct.pack("<I", trailer_size)

    def pack(messages: Sequence[bytes]) -> bytes:
        return join([prefix + seal(message) for message in messages])

    def unpack(frames: list[bytes]) -> list[bytes]:
        return [unseal(frame[4:]) for frame in frames]

    return Wire(8 + trailer_size, pack, unpack)


# ---- logging in ----


def exchange(sock: socket.socket, token: bytes | None) -> bytes:
    """Send a token, if there is one, and receive the answer."""
    if token:
        sock.sendall(join([token]))
    data = b""
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "little"):
        got = sock.recv(65536)
        if not got:
            raise ConnectionError("the server has closed during the handshake")
        data += got
    return data[4:]


def log_in_by_ntlm(sock: socket.socket) -> Wire:
    # Raw NTLM: its numbers begin at 0.
    context = spnego.client(username="DOM\\alice", password=os.environ["BENCH_PASSWORD"], protocol="ntlm")
    token = context.step()
    while not context.complete:
        token = context.step(exchange(sock, token))
    if token:
        sock.sendall(join([token]))
    if _sealing is None:
        return slow_wire(16, lambda message: context.wrap(message).data, lambda token: context.unwrap(token).data)
    return native_wire(_sealing.NTLMSealer(context.session_key, initiator=True, send_sequence=0, receive_sequence=0))


class KerberosClient:
    """Logs in with MIT's own SPNEGO, offering nothing but Kerberos."""

    def __init__(self) -> None:
        import gssapi  # noqa: PLC0415 - not wanted by the others

        self._gssapi = gssapi
        krb5, spnego_oid = gssapi.OID.from_int_seq("1.2.840.113554.1.2.2"), gssapi.OID.from_int_seq("1.3.6.1.5.5.2")
        service, _, host = os.environ["BENCH_TARGET"].partition("/")
        self._name = gssapi.Name(f"{service}@{host}", gssapi.NameType.hostbased_service)
        self._mechanism = spnego_oid
        self._credential = gssapi.Credentials(usage="initiate", mechs=[krb5])
        flags = gssapi.RequirementFlag
        self._flags = [
            flags.mutual_authentication,
            flags.confidentiality,
            flags.integrity,
            flags.replay_detection,
            flags.out_of_sequence_detection,
        ]

    def __call__(self, sock: socket.socket) -> Wire:
        """Log in."""
        gssapi = self._gssapi
        context = gssapi.SecurityContext(
            name=self._name, usage="initiate", mech=self._mechanism, creds=self._credential, flags=self._flags
        )
        token = context.step()
        while not context.complete:
            token = context.step(exchange(sock, token))
        if token:
            sock.sendall(join([token]))
        if _sealing is None:
            return slow_wire(
                60, lambda data: context.wrap(data, True).message, lambda data: context.unwrap(data).message
            )
        oid = gssapi.raw.inquire_sec_context_by_oid(context, gssapi.OID.from_int_seq("1.2.840.113554.1.2.2.5.5"))[1]
        exported = gssapi.raw.krb5_export_lucid_sec_context(context, 1)
        keys = exported.cfx_kd
        subkey = keys.acceptor_subkey is not None
        return native_wire(
            _sealing.KerberosSealer(
                keys.acceptor_subkey if subkey else keys.ctx_key,
                oid[-1],  # an OID's last byte is the enctype
                initiator=True,
                acceptor_subkey=subkey,
                send_sequence=exported.send_seq,
                receive_sequence=exported.recv_seq,
            )
        )


def connect(port: int, wire: str, number: int) -> "list[Connection]":
    """Connect and log in, one after the other."""
    if wire.endswith("-stream"):
        # Only here: what it logs in with is not needed by the others, and it is made of what stands above.
        from stream_load import connect_streams  # noqa: PLC0415

        return connect_streams(port, wire, number)
    log_in = {"ntlm": log_in_by_ntlm, "kerberos": KerberosClient() if wire == "kerberos" else None}.get(wire)
    tls = None
    if wire == "tls":
        tls = ssl.create_default_context(cafile=os.environ["BENCH_AUTHORITY"])
        tls.minimum_version = ssl.TLSVersion.TLSv1_3
    connections = []
    for _ in range(number):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            sock = tls.wrap_socket(sock, server_hostname="localhost")
        connections.append(Connection(sock, log_in(sock) if log_in else PLAIN))
        sock.setblocking(False)
    return connections


# ---- one connection ----


class Connection:
    """A logged-in connection, and what is under way on it."""

    __slots__ = ("expected", "partial", "rest", "sent", "sock", "to_send", "watched", "wire")

    def __init__(self, sock: socket.socket, wire: Wire) -> None:
        self.sock = sock
        self.wire = wire
        self.sent: deque[list[float]] = deque()  # [when, how many of them are still out]
        self.partial = 0  # bytes of the next reply that have come
        self.to_send = b""  # what the kernel would not take yet
        self.watched = False  # whether the poll waits for the kernel to take more
        # With --verify:
        self.rest = b""
        self.expected: deque[bytes] = deque()

    def send(self, data: bytes) -> None:
        """Send, now or when the kernel takes it."""
        if self.to_send:
            self.to_send += data
            return
        self.to_send = data
        self.flush()

    def flush(self) -> None:
        """Send what the kernel would not take before."""
        data = self.to_send
        try:
            while data:
                sent = self.sock.send(data)
                data = data[sent:] if sent < len(data) else b""
        except BLOCKING:
            pass
        self.to_send = data

    def receive_into(self, buffer: bytearray | memoryview) -> int:
        """How many bytes came; with TLS all that there are, or the rest would wait for the next that come."""
        if not isinstance(self.sock, ssl.SSLSocket):
            return self.sock.recv_into(buffer)
        size, view = 0, memoryview(buffer)
        while size < len(buffer):
            try:
                got = self.sock.recv_into(view[size:])
            except BLOCKING:
                break
            if not got:
                return size
            size += got
        # No data at all is half a TLS record, or a session ticket: not an end.
        return size or -1

    def count(self, data: memoryview) -> int:
        """How many bytes of replies these are; all of them where a message is as long on the way back as there."""
        return len(data)

    def check(self, data: bytes) -> None:
        """That these are the replies expected."""
        frames, self.rest = split(self.rest + data)
        for message in self.wire.unpack(frames):
            if message != self.expected.popleft():
                raise AssertionError("a reply is not what was sent")


# ---- a run ----


@dataclass
class Run:
    """One measured run; times in seconds.

    Attributes:
        messages: How many were echoed.
        seconds: How long that took.
        server_cpu: Of the server's process, None if it is not known.
        load_cpu: Of this process.
        p50: Of the time from a message's sending to its reply.
        p99: The same.
    """

    messages: int
    seconds: float
    server_cpu: float | None
    load_cpu: float
    p50: float
    p99: float


def cpu_of(pid: int) -> float:
    """Seconds of CPU of a whole process, to the nanosecond: clock_getcpuclockid(3), which Python does not have."""
    return time.clock_gettime_ns((~pid << 3) | 2) / 1e9


class Load:
    """Drives the connections."""

    def __init__(self, connections: Sequence[Connection], server_pid: int | None, *, verify: bool) -> None:
        self._by_fd = {connection.sock.fileno(): connection for connection in connections}
        self._poll = select.epoll()
        for fd in self._by_fd:
            self._poll.register(fd, select.EPOLLIN)
        self._buffer = bytearray(RECEIVE_SIZE)
        self._server_pid = server_pid
        self._verify = verify
        self._numbers = 0
        self._latencies: list[tuple[float, int]] = []

    def _send(self, connection: Connection, number: int, message: bytes, now: float) -> None:
        messages = [message] * number
        if self._verify:
            messages = [self._numbered(message) for _ in messages]
            connection.expected.extend(messages)
        connection.sent.append([now, number])
        connection.send(connection.wire.pack(messages))

    def _numbered(self, message: bytes) -> bytes:
        self._numbers += 1
        return (struct.pack("<Q", self._numbers) + message[8:])[: len(message)]

    def run(self, size: int, window: int, seconds: float) -> Run:
        """One run; 0 seconds: each connection's window once. At its end nothing is outstanding."""
        message = os.urandom(size)
        reply_size = size + next(iter(self._by_fd.values())).wire.overhead
        by_fd, poll, clock, receive = self._by_fd, self._poll.poll, time.perf_counter, self._receive
        self._latencies = latencies = []
        begin = clock()
        start = end = begin + WARM_UP * seconds
        first = last = (begin, 0.0, 0.0)
        measuring, sending = False, seconds > 0
        for connection in by_fd.values():
            self._send(connection, window, message, clock())
            self._watch(connection)
        under_way = len(by_fd) * window
        while under_way:
            now = clock()
            if sending and not measuring and now >= start:
                first, measuring, end = self._reading(), True, now + seconds
                latencies.clear()
            elif measuring and now >= end and latencies:
                last, sending, measuring = self._reading(), False, False
                self._latencies = []
            events = poll(SILENCE)
            if not events:
                raise TimeoutError(f"no reply for {SILENCE} s, {under_way} messages outstanding or more")
            for fd, event in events:
                connection = by_fd[fd]
                if event & select.EPOLLOUT:
                    connection.flush()
                if event & ~select.EPOLLOUT and (done := receive(connection, reply_size)):
                    if sending:
                        self._send(connection, done, message, clock())
                    else:
                        under_way -= done
                if connection.to_send or connection.watched:
                    self._watch(connection)
        return self._result(latencies, first, last)

    def _receive(self, connection: Connection, reply_size: int) -> int:
        """Receive once; how many replies are complete now that were not before."""
        got = connection.receive_into(self._buffer)
        if got <= 0:
            if got == 0:
                raise ConnectionError("the server has closed a connection")
            return 0
        data = memoryview(self._buffer)[:got]
        if self._verify:
            connection.check(bytes(data))
        done, connection.partial = divmod(connection.partial + connection.count(data), reply_size)
        now, left, sent = time.perf_counter(), done, connection.sent
        while left:
            entry = sent[0]
            part = min(left, entry[1])
            self._latencies.append((now - entry[0], part))
            left -= part
            entry[1] -= part
            if not entry[1]:
                sent.popleft()
        return done

    def _watch(self, connection: Connection) -> None:
        """Wait for room to send while something waits for it."""
        blocked = bool(connection.to_send)
        if blocked != connection.watched:
            connection.watched = blocked
            self._poll.modify(connection.sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if blocked else 0))

    def _reading(self) -> tuple[float, float, float]:
        """Now: time, the server's CPU, ours."""
        server = cpu_of(self._server_pid) if self._server_pid else 0.0
        return time.perf_counter(), server, time.process_time()

    def _result(
        self, latencies: list[tuple[float, int]], first: tuple[float, float, float], last: tuple[float, float, float]
    ) -> Run:
        elapsed, server, load = (after - before for before, after in zip(first, last, strict=True))
        return Run(
            messages=sum(number for _, number in latencies),
            seconds=elapsed,
            server_cpu=server if self._server_pid else None,
            load_cpu=load,
            p50=percentile(latencies, 0.5),
            p99=percentile(latencies, 0.99),
        )


def percentile(latencies: Iterable[tuple[float, int]], share: float) -> float:
    """The time within which this share of the messages was answered."""
    ordered = sorted(latencies)
    left = share * sum(number for _, number in ordered)
    for latency, number in ordered:
        left -= number
        if left <= 0:
            return latency
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description="many connections to an echo server")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--wire", choices=WIRES, required=True)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="bytes of a message (default: 32)")
    parser.add_argument("--window", type=int, default=16, help="messages outstanding to a connection (default: 16)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, after a fifth as much of warming up")
    parser.add_argument("--verify", action="store_true", help="open and compare every reply")
    parser.add_argument("--server-pid", type=int, help="whose CPU to measure")
    parser.add_argument("--commands", action="store_true", help="runs come from standard input")
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    load = Load(connect(options.port, options.wire, options.connections), options.server_pid, verify=options.verify)
    # What there is by now stays, and nothing in a run makes cycles.
    gc.collect()
    gc.disable()
    if not options.commands:
        print(json.dumps(asdict(load.run(options.size, options.window, options.seconds))))
        return
    print(json.dumps({"sealing": "triosspi._sealing" if _sealing is not None else "pyspnego"}), flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(load.run(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
