"""What a clock tells an attacker: the time of a refused NTLM login, by what is wrong with it.

    python bench/bench_refusals.py [--logins 10000]

Each login is the acceptor's own part, both steps, raw NTLM, in this process; an account that is not there, a wrong password, a
disabled account, and an account without a domain take turns in a shuffled order, so that whatever the machine does meets all
alike. What matters is the lower end: noise only adds. The baseline is the wrong password.
"""

import argparse
import gc
import random
import statistics
import sys
import time
from pathlib import Path

from measure import machine, versions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from forge import Client, nt_hash
from triosspi import Acceptor, Account, AuthenticationError
from triosspi.security.ntlm.accounts import AccountTable

BASELINE = "wrong password"
# The names are equally long: what a client chooses it knows anyway.
CLIENTS = {
    BASELINE: ("DOM", "alice"),
    "unknown account": ("DOM", "zelda"),
    "unknown domain": ("XYZ", "alice"),
    "disabled account": ("DOM", "david"),
    "account without a domain": ("DOM", "wilma"),
}


def accounts() -> AccountTable:
    table = AccountTable()
    for number in range(1000):
        table.add(Account("DOM", f"user{number}", bytes(16)))
    table.add(Account("DOM", "alice", nt_hash("secret")))
    table.add(Account("DOM", "david", nt_hash("secret"), enabled=False))
    table.add(Account("", "wilma", nt_hash("secret")))
    return table


def one_login(acceptor: Acceptor, domain: str, user: str) -> float:
    """Seconds that the acceptor takes for both steps of a login that is refused."""
    client = Client(user=user, domain=domain, password="not this one")
    context = acceptor.new_context()
    negotiate = client.negotiate()
    begin = time.perf_counter()
    challenge = context.step(negotiate)
    took = time.perf_counter() - begin
    authenticate = client.authenticate(challenge)
    begin = time.perf_counter()
    try:
        context.step(authenticate)
    except AuthenticationError:
        return took + time.perf_counter() - begin
    raise AssertionError("nobody has this password")


def main() -> None:
    parser = argparse.ArgumentParser(description="the time of a refused login, by its reason")
    parser.add_argument("--logins", type=int, default=10_000, help="of each kind (default: 10,000)")
    options = parser.parse_args()
    print(f"machine: {machine()}")
    print(f"{versions('triosspi', 'pyspnego')}; {options.logins:,} logins of each kind, shuffled; microseconds")
    acceptor = Acceptor(accounts=accounts())
    order = [name for name in CLIENTS for _ in range(options.logins)]
    random.Random(12).shuffle(order)
    for names in CLIENTS.values():
        one_login(acceptor, *names)
    found: dict[str, list[float]] = {name: [] for name in CLIENTS}
    gc.disable()
    for number, name in enumerate(order):
        found[name].append(one_login(acceptor, *CLIENTS[name]) * 1e6)
        if number % 1000 == 0:
            gc.collect()
    print(f"\n{'':26}{'p10':>10}{'p50':>10}{'p90':>10}{'p10 less':>12}")
    tenths = {name: statistics.quantiles(samples, n=10) for name, samples in found.items()}
    for name, values in tenths.items():
        less = tenths[BASELINE][0] - values[0]
        print(f"{name:26}{values[0]:10.1f}{values[4]:10.1f}{values[8]:10.1f}{less:12.1f}")


if __name__ == "__main__":
    main()
