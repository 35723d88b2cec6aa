"""What a login costs the acceptor: triosspi against a bare `spnego.server()`, NTLM, by number of accounts.

    python bench/bench_handshake.py [--quick]

Microseconds of the acceptor's own CPU per login, construction and steps, without I/O; the client's part is not counted.
Each number is the median of interleaved repeats, in brackets their spread (half the distance between the quartiles, as
a share of the median).

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
from functools import partial
from pathlib import Path

import spnego

from measure import describe, interleaved, machine, versions
from triosspi import Acceptor, AccountFile, Initiator
from triosspi.security.context import SecurityContext
from triosspi.security.spnego_compat import nt_hash

PASSWORD = "correct horse battery staple"
HASH_LINE = "{}:65534:" + "0" * 32 + ":{}:[U          ]:LCT-65000000\n"


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


def time_logins(
    new_acceptor: Callable[[], SecurityContext | spnego.ContextProxy], initiator: Initiator, logins: int
) -> float:
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


def stock(path: Path) -> Callable[[], spnego.ContextProxy]:
    def new() -> spnego.ContextProxy:
        os.environ["NTLM_USER_FILE"] = str(path)
        return spnego.server(protocol="negotiate", options=spnego.NegotiateOptions.use_negotiate)

    return new


def main() -> None:
    parser = argparse.ArgumentParser(description="the acceptor's cost of an NTLM login")
    parser.add_argument("--quick", action="store_true", help="fewer accounts, fewer logins")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats, at least 5 (default: 7)")
    parser.add_argument("--only", choices=["triosspi", "spnego"], help="run one of the two, for a profiler")
    options = parser.parse_args()
    repeats = max(5, options.repeats)
    logins = 30 if options.quick else 100
    numbers = (1, 1_000) if options.quick else (1, 1_000, 100_000)

    print(f"machine: {machine()}")
    print(f"{versions('triosspi', 'pyspnego')}; {repeats} interleaved repeats of {logins} logins")
    with tempfile.TemporaryDirectory() as folder:
        paths = {number: write_accounts(Path(folder), number) for number in numbers}
        acceptors = {}
        for number, path in paths.items():
            start = time.thread_time()
            acceptors[number] = Acceptor(accounts=AccountFile(path))
            if number == max(numbers):
                print(f"loading {number} accounts: {time.thread_time() - start:.2f} s of CPU")
        print(
            f"\n{'us of acceptor CPU per login':32}{'accounts':>10}{'spnego.server()':>18}{'triosspi':>18}{'ratio':>8}"
        )
        for form in ("SPNEGO", "raw NTLM"):
            initiator = Initiator(username="DOM\\alice", password=PASSWORD, mechanism="ntlm", raw=form == "raw NTLM")
            runs: dict[str, Callable[[], float]] = {}
            for number in numbers:
                # A scan of 100,000 lines takes the bare acceptor tens of milliseconds.
                bare = max(2, logins // 20) if number > 10_000 else logins
                if options.only != "triosspi":
                    runs[f"spnego {number}"] = partial(time_logins, stock(paths[number]), initiator, bare)
                if options.only != "spnego":
                    runs[f"triosspi {number}"] = partial(time_logins, acceptors[number].new_context, initiator, logins)
            for run in runs.values():
                run()  # warm
            samples = interleaved(runs, repeats)
            for number in numbers:
                both = [samples.get(f"{name} {number}") for name in ("spnego", "triosspi")]
                line = f"{form:32}{number:10}" + "".join(f"{describe(s) if s else '-':>18}" for s in both)
                if all(both):
                    line += f"{statistics.median(both[1] or []) / statistics.median(both[0] or []):8.2f}"
                print(line, flush=True)
            if options.only != "spnego":
                medians = [statistics.median(samples[f"triosspi {number}"]) for number in numbers]
                print(f"{form}, triosspi: {numbers[-1]} accounts cost {medians[-1] / medians[0]:.2f} times one")


if __name__ == "__main__":
    sys.exit(main())
