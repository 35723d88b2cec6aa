"""Sealing and opening one message, from Python: natively, by pyspnego, and by python-gssapi, side by side.

    python bench/bench_sealing.py [--quick] [--repeats N]
    python bench/bench_sealing.py --threads    what releasing the GIL buys and costs
    python bench/bench_sealing.py --memory     what a sealer holds

Every number is microseconds of CPU per message: the median of interleaved repeats, and in brackets their spread (half the
distance between the quartiles, as a share of the median). `pyspnego` is `wrap_winrm` or `unwrap_winrm` and the framing
(``length | trailer_length | trailer | ciphertext``) in Python, which is what one would write without this package;
`gssapi` is `gssapi.raw.wrap` or `unwrap` alone, MIT's own cost. `native` is one message a call, `batch` is 64 of them.
For fair figures gssapi must be built with optimisation (pip's default; the tests' environment has it without).

To see where the extension spends its time, build it with symbols and profile it (Linux, `perf`):

    CFLAGS='-O2 -g' python setup.py build_ext --inplace --force
    perf record --call-graph dwarf python bench/bench_sealing.py --only native && perf report
"""

import argparse
import contextlib
import ctypes
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import spnego

from measure import interleaved, machine, versions
from realm import kerberos
from triosspi import _sealing
from triosspi._sealing import KerberosSealer, NTLMSealer

ROOT = Path(__file__).resolve().parent.parent

SIZES = (32, 1024, 16384, 65536)
BATCH = 64
ENCTYPES = "aes256-cts-hmac-sha1-96 aes128-cts-hmac-sha1-96 aes256-cts-hmac-sha384-192 aes128-cts-hmac-sha256-128"
# What a release of the project wants to show: (mechanism, what, size) to how many times faster than pyspnego.
GOALS = {
    ("NTLM", "seal", 32): 30,
    ("NTLM", "seal", 1024): 5,
    ("NTLM", "seal", 65536): 1.05,
    ("Kerberos", "seal", 32): 30,
    ("Kerberos", "open", 32): 40,
    ("Kerberos", "seal", 16384): 4,
    ("Kerberos", "open", 16384): 8,
}


class Way(Protocol):
    """A pair of contexts, and how they seal and open: frames each."""

    per_call: int  # messages

    def seal(self, messages: list[bytes]) -> list[bytes]:
        """Frames, maybe several in one."""
        ...

    def open(self, frames: list[bytes]) -> None:
        """From frames without their lengths."""
        ...


def payloads(data: bytes) -> list[bytes]:
    """Frames without their lengths, as the scanner gives them."""
    found, at = [], 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        found.append(data[at + 4 : end])
        at = end
    return found


class Native:
    """The extension."""

    def __init__(self, sends: Any, receives: Any, per_call: int) -> None:
        self._seal_frames, self._open_frames = sends.seal_frames, receives.open_frames
        self.per_call = per_call

    def seal(self, messages: list[bytes]) -> list[bytes]:
        """See `Way.seal`."""
        seal_frames = self._seal_frames
        if self.per_call == 1:
            return [seal_frames([message]) for message in messages]
        return [seal_frames(messages[at : at + self.per_call]) for at in range(0, len(messages), self.per_call)]

    def open(self, frames: list[bytes]) -> None:
        """See `Way.open`."""
        open_frames = self._open_frames
        if self.per_call == 1:
            for frame in frames:
                open_frames([frame])
        else:
            for at in range(0, len(frames), self.per_call):
                open_frames(frames[at : at + self.per_call])


class Pyspnego:
    """`wrap_winrm`, and the framing in Python."""

    per_call = 1

    def __init__(self, sends: Any, receives: Any) -> None:
        self._wrap, self._unwrap = sends.wrap_winrm, receives.unwrap_winrm

    def seal(self, messages: list[bytes]) -> list[bytes]:
        """See `Way.seal`."""
        wrap = self._wrap
        frames = []
        for message in messages:
            sealed = wrap(message)
            header, data = sealed.header, sealed.data
            frames.append(
                (4 + len(header) + len(data)).to_bytes(4, "little") + len(header).to_bytes(4, "little") + header + data
            )
        return frames

    def open(self, frames: list[bytes]) -> None:
        """See `Way.open`."""
        unwrap = self._unwrap
        for frame in frames:
            cut = 4 + int.from_bytes(frame[:4], "little")
            unwrap(frame[4:cut], frame[cut:])


class GSSAPI:
    """python-gssapi, without any framing."""

    per_call = 1

    def __init__(self, sends: Any, receives: Any) -> None:
        from gssapi.raw import unwrap, wrap  # noqa: PLC0415 - optional

        self._wrap, self._unwrap, self._sends, self._receives = wrap, unwrap, sends, receives

    def seal(self, messages: list[bytes]) -> list[bytes]:
        """See `Way.seal`."""
        wrap, context = self._wrap, self._sends
        # The length before and behind it are the reader's, below; they cost 0.1 us.
        return [
            (4 + len(token)).to_bytes(4, "little") + bytes(4) + token
            for token in [wrap(context, message, True, None).message for message in messages]
        ]

    def open(self, frames: list[bytes]) -> None:
        """See `Way.open`."""
        unwrap, context = self._unwrap, self._receives
        for frame in frames:
            unwrap(context, frame[4:])


def shake_hands(client: Any, server: Any) -> tuple[Any, Any]:
    token = client.step()
    while not (client.complete and server.complete):
        token = server.step(token)
        if token is not None and not client.complete:
            token = client.step(token)
    return client, server


@contextlib.contextmanager
def ntlm_ways(directory: Path) -> Iterator[dict[str, Callable[[], Way]]]:
    users = directory / "users"
    users.write_text("DOM:alice:a password\n")
    os.environ["NTLM_USER_FILE"] = str(users)

    def pyspnego() -> Way:
        client = spnego.client("DOM\\alice", "a password", protocol="ntlm")
        return Pyspnego(*shake_hands(client, spnego.server(protocol="ntlm")))

    def native(per_call: int) -> Way:
        key = os.urandom(16)
        sends, receives = (
            NTLMSealer(key, initiator=initiator, send_sequence=0, receive_sequence=0) for initiator in (True, False)
        )
        return Native(sends, receives, per_call)

    yield {"pyspnego": pyspnego, "native": partial(native, 1), "batch": partial(native, BATCH)}


@contextlib.contextmanager
def kerberos_ways(directory: Path) -> Iterator[dict[str, Callable[[], Way]]]:
    with kerberos() as found:
        if found is None:
            yield {}
            return
        keytab, target = found
        os.environ["KRB5_KTNAME"] = keytab
        # AES-256 with SHA-1 first, which is what Windows chooses, and what the goals are about.
        preferred = directory / "krb5.conf"
        preferred.write_text(f"[libdefaults]\npermitted_enctypes = {ENCTYPES}\n")
        os.environ["KRB5_CONFIG"] = f"{preferred}:{os.environ['KRB5_CONFIG']}"
        service, _, host = target.partition("/")

        def login() -> tuple[Any, Any]:
            client = spnego.client(hostname=host, service=service, protocol="kerberos")
            return shake_hands(client, spnego.server(hostname=host, service=service, protocol="kerberos"))

        def gssapi() -> Way:
            client, server = login()
            return GSSAPI(client._context, server._context)  # noqa: SLF001 - the python-gssapi contexts

        def native(per_call: int) -> Way:
            from gssapi.raw import krb5_export_lucid_sec_context  # noqa: PLC0415 - optional

            sealers = []
            for proxy in login():
                lucid = krb5_export_lucid_sec_context(proxy._context, 1)  # noqa: SLF001 - the same
                keys = lucid.cfx_kd
                assert keys.acceptor_subkey_type == 18
                sealers.append(
                    KerberosSealer(
                        keys.acceptor_subkey,
                        keys.acceptor_subkey_type,
                        initiator=bool(lucid.is_initiator),
                        acceptor_subkey=True,
                        send_sequence=lucid.send_seq,
                        receive_sequence=lucid.recv_seq,
                    )
                )
            return Native(sealers[0], sealers[1], per_call)

        yield {
            "pyspnego": lambda: Pyspnego(*login()),
            "gssapi": gssapi,
            "native": partial(native, 1),
            "batch": partial(native, BATCH),
        }


def sample(new_way: Callable[[], Way], what: str, size: int, seconds: float) -> Callable[[], float]:
    """Make what measures one sample.

    As a server does it: as much at a time as one read brings, which is not kept, so that memory is warm.
    """
    way = new_way()
    messages = [os.urandom(size)] * (BATCH if way.per_call > 1 else max(1, min(BATCH, 65536 // size)))

    def run(turns: int) -> float:
        spent = 0.0
        for _ in range(turns):
            start = time.thread_time()
            frames = way.seal(messages)
            sealed = time.thread_time()
            if what == "open":
                received = [payload for frame in frames for payload in payloads(frame)]
                start = time.thread_time()
                way.open(received)
                sealed = time.thread_time()
            spent += sealed - start
        return spent / (turns * len(messages)) * 1e6

    run(10)  # warm
    return partial(run, max(1, round(seconds * 1e6 / (max(run(10), 0.01) * len(messages)))))


def told(samples: list[float]) -> str:
    """The median and the spread, as `measure.describe` has them, with another digit."""
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4)
    return f"{median:.2f} [{(high - low) / 2 / median:4.0%}]"


def compare(
    mechanism: str, ways: Mapping[str, Callable[[], Way]], sizes: tuple[int, ...], repeats: int, seconds: float
) -> bool:
    met = True
    for what in ("seal", "open"):
        for size in sizes:
            samples = interleaved({name: sample(way, what, size, seconds) for name, way in ways.items()}, repeats)
            medians = {name: statistics.median(values) for name, values in samples.items()}
            line = f"{mechanism:9}{what:6}{size:7}"
            line += "".join(f"{told(samples[name]) if name in samples else '':>18}" for name in COLUMNS)
            if "pyspnego" in medians and "native" in medians:
                ratio = medians["pyspnego"] / medians["native"]
                line += f"{ratio:9.2f}{medians['pyspnego'] / medians['batch']:9.2f}"
                goal = GOALS.get((mechanism, what, size))
                if goal is not None:
                    met = met and ratio >= goal
                    line += f"   goal {goal:g}: {'met' if ratio >= goal else 'NOT MET'}"
            print(line, flush=True)
    return met


COLUMNS = ("pyspnego", "gssapi", "native", "batch")


def new_ntlm(build: Any = _sealing) -> NTLMSealer:
    return build.NTLMSealer(os.urandom(16), initiator=True, send_sequence=0, receive_sequence=0)


def new_kerberos(enctype: int, build: Any = _sealing) -> KerberosSealer:
    key = os.urandom(32 if enctype in (18, 20) else 16)
    return build.KerberosSealer(key, enctype, initiator=True, acceptor_subkey=True, send_sequence=0, receive_sequence=0)


# ---- --threads ----


def count_calls(call: Callable[[], object], until: float, into: list[int]) -> None:
    count = 0
    while time.perf_counter() < until:
        call()
        count += 1
    into.append(count)


def together(calls: list[Callable[[], object]], seconds: float) -> list[int]:
    """How often each was called, in threads side by side."""
    counts: list[list[int]] = [[] for _ in calls]
    until = time.perf_counter() + seconds
    threads = [
        threading.Thread(target=count_calls, args=(call, until, count))
        for call, count in zip(calls, counts, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [count[0] for count in counts]


def built_to_release_from(size: int, place: Path) -> ModuleType:
    """The extension once more, compiled to release the GIL from so many bytes in a call on. Needs the compiler."""
    flags = f"{os.environ.get('CFLAGS', '')} -DSEALING_RELEASE_FROM={size}"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--force"]
    command += ["--build-lib", str(place), "--build-temp", str(place / "objects")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "CFLAGS": flags}, check=True)
    (path,) = place.glob("triosspi/_sealing.*")
    spec = importlib.util.spec_from_file_location("triosspi._sealing", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def threads(repeats: int, seconds: float) -> None:
    """The best of the repeats: a core that somebody else takes for a while would look like a GIL not released."""
    with tempfile.TemporaryDirectory() as directory:
        builds = {
            mode: built_to_release_from(size, Path(directory) / mode)
            for mode, size in (("keeps", 1 << 62), ("releases", 0))
        }
    print(f"{'':9}{'bytes':>8}{'':10}{'two sealing':>14}{'sealing beside busy Python':>30}   (1.00: one alone)")
    for name, new in (("NTLM", new_ntlm), ("Kerberos", partial(new_kerberos, 18))):
        for size in (4096, 16384, 65536, 262144, 1 << 20):
            messages = [os.urandom(size)]

            def one(
                build: ModuleType, new: Callable[..., Any] = new, messages: list[bytes] = messages
            ) -> Callable[[], object]:
                return partial(new(build=build).seal_frames, messages)

            alone = max(together([one(builds["keeps"])], seconds)[0] for _ in range(repeats))
            for mode, build in builds.items():
                two = max(sum(together([one(build), one(build)], seconds)) for _ in range(repeats))
                beside = statistics.median(together([one(build), int], seconds)[0] for _ in range(repeats))
                print(f"{name:9}{size:8}{mode:>10}{two / alone:14.2f}{beside / alone:30.2f}", flush=True)


# ---- --memory ----


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(f"field{at}", ctypes.c_size_t) for at in range(7)] + [
        ("uordblks", ctypes.c_size_t),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    ]


def memory() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        print("no mallinfo2 here: glibc 2.33 has it")
        return
    libc.mallinfo2.restype = _Mallinfo2
    kinds = {"NTLM": new_ntlm} | {f"Kerberos {enctype}": partial(new_kerberos, enctype) for enctype in (17, 18, 19, 20)}
    for name, new in kinds.items():
        held: list[Any] = [new() for _ in range(10)] * 101
        before = libc.mallinfo2().uordblks
        start = time.thread_time()
        for at in range(1000):
            held[at] = new()
        made = (time.thread_time() - start) * 1000
        heap = (libc.mallinfo2().uordblks - before) / 1000
        print(f"{name:12} {heap + sys.getsizeof(held[0]):6.0f} bytes, made in {made:.1f} us")


def main() -> int:
    parser = argparse.ArgumentParser(description="sealing: native, pyspnego, gssapi")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, shorter repeats")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved repeats, at least 5 (default: 9)")
    parser.add_argument("--only", choices=COLUMNS, help="one way only, for a profiler")
    parser.add_argument("--threads", action="store_true", help="instead: the GIL kept and released, in two threads")
    parser.add_argument("--memory", action="store_true", help="instead: bytes of a sealer")
    options = parser.parse_args()
    repeats = max(5, options.repeats)
    seconds = 0.01 if options.quick else 0.05  # of one repeat of one workload
    sizes = (32, 1024) if options.quick else SIZES
    print(f"machine: {machine()}")
    print(f"{versions('triosspi', 'pyspnego', 'cryptography')}; {repeats} interleaved repeats\n")
    if options.memory:
        memory()
        return 0
    if options.threads:
        threads(repeats, seconds * 4)
        return 0
    print(f"{'us per message':15}{'bytes':>7}" + "".join(f"{name:>18}" for name in COLUMNS) + "  / native  / batch")
    met = True
    for mechanism, ways in (("NTLM", ntlm_ways), ("Kerberos", kerberos_ways)):
        with tempfile.TemporaryDirectory() as directory, ways(Path(directory)) as chosen:
            if options.only:
                chosen = {name: way for name, way in chosen.items() if name == options.only}  # noqa: PLW2901
            if chosen:
                met = compare(mechanism, chosen, sizes, repeats, seconds) and met
    print("\nThe last columns: pyspnego's time by ours." + ("" if met else " Not all goals are met."))
    return 0


if __name__ == "__main__":
    sys.exit(main())
