"""What a login costs the acceptor: triosspi against a bare `spnego.server()`.

    python bench/bench_handshake.py [--quick]

Microseconds of the acceptor's own CPU per login, construction and steps, without I/O; the client's part is not counted.
Each number is the median of interleaved repeats, in brackets their spread (half the distance between the quartiles, as
a share of the median). NTLM by the number of accounts; Kerberos with an MIT KDC where one can be started (see
tests/peers), replay cache on for both.

To see where the time goes:

    py-spy record -o handshake.svg -- python bench/bench_handshake.py --only triosspi
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import spnego

from measure import describe, interleaved, machine, versions
from realm import kerberos
from triosspi import Acceptor, AccountFile, Initiator
from triosspi.security.context import SecurityContext
from triosspi.security.ntlm.primitives import nt_hash

PASSWORD = "correct horse battery staple"
HASH_LINE = "{}:65534:" + "0" * 32 + ":{}:[U          ]:LCT-65000000\n"
# A scan of 100,000 lines takes the bare acceptor a quarter of a second.
MANY = 10_000


def write_accounts(folder: Path, number: int) -> Path:
    """An account file whose last entry is the one that logs in: the worst place for whoever scans."""
    hashed = nt_hash(PASSWORD).hex().upper()
    path = folder / f"accounts-{number}"
    with path.open("w") as file:
        for index in range(number - 1):
            file.write(HASH_LINE.format(f"DOM\\user{index}", os.urandom(16).hex().upper()))
        file.write(HASH_LINE.format("DOM\\alice", hashed))
    path.chmod(0o600)
    return path


NewAcceptor = Callable[[], SecurityContext | spnego.ContextProxy]


def time_logins(new_acceptor: NewAcceptor, initiator: Initiator, logins: int) -> float:
    """Microseconds of CPU per login, of the acceptor's side alone."""
    spent = 0.0
    for _ in range(logins):
        client = initiator.new_context()
        token = client.step(None)
        start = time.thread_time()
        server = new_acceptor()
        spent += time.thread_time() - start
        while token:
            start = time.thread_time()
            answer = server.step(token)
            spent += time.thread_time() - start
            token = client.step(answer) if answer and not client.established else b""
        assert server.established if isinstance(server, SecurityContext) else server.complete
    return spent / logins * 1e6


def stock(variable: str, value: str) -> NewAcceptor:
    """Bare pyspnego, which takes its accounts and keys from the environment."""

    def new() -> spnego.ContextProxy:
        os.environ[variable] = value
        return spnego.server(protocol="negotiate", options=spnego.NegotiateOptions.use_negotiate)

    return new


@dataclass
class Row:
    """One line of the table: one kind of login, by both."""

    name: str
    initiator: Initiator
    stock: NewAcceptor
    ours: NewAcceptor
    stock_logins: int
    logins: int


def ntlm_rows(folder: Path, numbers: tuple[int, ...], logins: int) -> list[Row]:
    rows = []
    for number in numbers:
        path = write_accounts(folder, number)
        start = time.thread_time()
        acceptor = Acceptor(accounts=AccountFile(path))
        if number == max(numbers):
            print(f"loading {number} accounts: {time.thread_time() - start:.2f} s of CPU")
        for form in ("SPNEGO", "raw"):
            initiator = Initiator(username="DOM\\alice", password=PASSWORD, mechanism="ntlm", raw=form == "raw")
            few = max(2, logins // 20) if number > MANY else logins
            name = f"NTLM, {form}, {number} accounts"
            rows.append(Row(name, initiator, stock("NTLM_USER_FILE", str(path)), acceptor.new_context, few, logins))
    return sorted(rows, key=lambda row: row.name.split(", ")[1])


def kerberos_rows(keytab: str, target: str, logins: int) -> list[Row]:
    acceptor = Acceptor(keytab=keytab)
    bare = stock("KRB5_KTNAME", keytab)
    rows = []
    for form in ("SPNEGO", "raw"):
        initiator = Initiator(mechanism="kerberos", target=target, raw=form == "raw")
        rows.append(Row(f"Kerberos, {form}", initiator, bare, acceptor.new_context, logins, logins))
    return rows


def measure(rows: list[Row], repeats: int, only: str | None) -> dict[str, float]:
    """Print the table; returns our medians."""
    ours = {}
    print(f"\n{'us of acceptor CPU per login':32}{'spnego.server()':>18}{'triosspi':>18}{'ratio':>8}")
    for row in rows:
        runs: dict[str, Callable[[], float]] = {}
        if only != "triosspi":
            runs["spnego"] = partial(time_logins, row.stock, row.initiator, row.stock_logins)
        if only != "spnego":
            runs["triosspi"] = partial(time_logins, row.ours, row.initiator, row.logins)
        for run in runs.values():
            run()  # warm
        samples = interleaved(runs, repeats)
        line = f"{row.name:32}" + "".join(
            f"{describe(samples[name]) if name in samples else '-':>18}" for name in ("spnego", "triosspi")
        )
        if len(samples) == 2:
            line += f"{statistics.median(samples['triosspi']) / statistics.median(samples['spnego']):8.2f}"
        print(line, flush=True)
        if "triosspi" in samples:
            ours[row.name] = statistics.median(samples["triosspi"])
    return ours


def main() -> None:
    parser = argparse.ArgumentParser(description="the acceptor's cost of a login")
    parser.add_argument("--quick", action="store_true", help="fewer accounts, fewer logins")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats, at least 5 (default: 7)")
    parser.add_argument("--only", choices=["triosspi", "spnego"], help="run one of the two, for a profiler")
    options = parser.parse_args()
    repeats = max(5, options.repeats)
    logins = 30 if options.quick else 100
    numbers = (1, 1_000) if options.quick else (1, 1_000, 100_000)

    print(f"machine: {machine()}")
    print(f"{versions('triosspi', 'pyspnego')}; {repeats} interleaved repeats of {logins} logins")
    with tempfile.TemporaryDirectory() as folder, kerberos() as service:
        rows = ntlm_rows(Path(folder), numbers, logins)
        if service is not None:
            rows += kerberos_rows(*service, logins)
        ours = measure(rows, repeats, options.only)
        for form in ("SPNEGO", "raw") if ours else ():
            few, many = (ours[f"NTLM, {form}, {number} accounts"] for number in (numbers[0], numbers[-1]))
            print(f"NTLM, {form}: {numbers[-1]} accounts cost a login {many / few:.2f} times what one does")


if __name__ == "__main__":
    sys.exit(main())
