"""Should a login's steps run on the event loop or in a worker thread? What 100 established connections see of either.

    python bench/bench_login_threads.py [--quick]

A server in a process of its own is pinned to one core, everything else to the other. 100 clients are logged in and send
one small message every 50 ms; meanwhile 1, 16 or 64 others log in, one after the other each, as fast as they can. The
table shows logins per second and how long the echoes of the 100 took, with the steps inline and with a thread for each;
"quiet" is without any login. Medians of the repeats, inline and thread in turns.
"""

import argparse
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import trio

from measure import machine, versions
from realm import kerberos
from triosspi import Acceptor, AccountFile, Initiator, SSPIChannel, open_sspi_over_tcp_channel, serve_sspi_over_tcp
from triosspi.service import account_editor
from triosspi.service.apps import echo
from triosspi.session.session import Session

PASSWORD = "correct horse battery staple"
ESTABLISHED = 100
PAUSE = 0.05


async def serve(mode, accounts, keytab):
    if mode == "thread":
        Session.may_block = property(lambda _self: True)
    acceptor = Acceptor(accounts=AccountFile(accounts), keytab=keytab or None)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(serve_sspi_over_tcp, echo, 0, acceptor, host="127.0.0.1"))
        print(listeners[0].transport_listener.socket.getsockname()[1], flush=True)


@contextmanager
def server(mode, accounts, keytab):
    command = [sys.executable, __file__, "--serve", mode, str(accounts), keytab]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            pin(process.pid, 0)
            yield int(re.search(r"\d+", process.stdout.readline())[0])
        finally:
            process.kill()


def pin(pid, core):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(pid, {cores[core % len(cores)]})


async def established(port, initiator, latencies, *, task_status):
    channel: SSPIChannel = await open_sspi_over_tcp_channel("127.0.0.1", port, initiator)
    async with channel:
        await channel.do_handshake()
        task_status.started()
        while True:
            start = trio.current_time()
            await channel.send(b"ping")
            await channel.receive()
            latencies.append(trio.current_time() - start)
            await trio.sleep(PAUSE)


async def log_in_for_ever(port, initiator, count):
    while True:
        channel = await open_sspi_over_tcp_channel("127.0.0.1", port, initiator)
        await channel.do_handshake()
        await trio.aclose_forcefully(channel)
        next(count)


async def measure(port, initiator, crowds, seconds):
    """For each number of logins at once: logins per second, and the latencies of the established."""
    ntlm = Initiator(username="DOM\\alice", password=PASSWORD, mechanism="ntlm")
    results = {}
    latencies = []
    async with trio.open_nursery() as nursery:
        for _ in range(ESTABLISHED):
            await nursery.start(established, port, ntlm, latencies)
        for crowd in crowds:
            count = itertools.count()
            async with trio.open_nursery() as logins:
                for _ in range(crowd):
                    logins.start_soon(log_in_for_ever, port, initiator, count)
                await trio.sleep(seconds / 4)
                latencies.clear()
                before, start = next(count), trio.current_time()
                await trio.sleep(seconds)
                rate = (next(count) - before) / (trio.current_time() - start)
                results[crowd] = (rate, list(latencies))
                logins.cancel_scope.cancel()
        nursery.cancel_scope.cancel()
    return results


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] * 1e3


def main():
    parser = argparse.ArgumentParser(description="login steps inline or in threads")
    parser.add_argument("--quick", action="store_true", help="shorter runs")
    parser.add_argument("--repeats", type=int, default=5, help="at least 5 (default: 5)")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        trio.run(serve, *options.serve)
    seconds = 0.5 if options.quick else 2.0
    crowds = (0, 1, 16, 64)
    print(f"machine: {machine()}")
    print(
        f"{versions('triosspi', 'trio')}; {max(5, options.repeats)} repeats of {seconds} s; ms of an echo's round trip"
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        accounts = folder / "accounts"
        account_editor.add(accounts, "DOM\\alice", PASSWORD)
        service = stack.enter_context(kerberos())
        initiators = {"NTLM": Initiator(username="DOM\\alice", password=PASSWORD, mechanism="ntlm")}
        if service is not None:
            initiators["Kerberos"] = Initiator(mechanism="kerberos", target=service[1])
        pin(0, 1)
        print(f"\n{'':10}{'logins':>8}{'logins/s':>20}{'p50':>18}{'p99':>18}")
        print(f"{'':10}{'at once':>8}{'inline':>10}{'thread':>10}" + f"{'inline':>9}{'thread':>9}" * 2)
        for mechanism, initiator in initiators.items():
            samples = {mode: {crowd: [] for crowd in crowds} for mode in ("inline", "thread")}
            for _ in range(max(5, options.repeats)):
                for mode, rows in samples.items():
                    with server(mode, accounts, service[0] if service else "") as port:
                        for crowd, (rate, latencies) in trio.run(measure, port, initiator, crowds, seconds).items():
                            rows[crowd].append((rate, percentile(latencies, 0.5), percentile(latencies, 0.99)))
            for crowd in crowds:
                columns = [
                    [statistics.median(row[column] for row in samples[mode][crowd]) for mode in samples]
                    for column in range(3)
                ]
                (r0, r1), (a0, a1), (b0, b1) = columns
                name = f"{mechanism:10}{crowd or 'quiet':>8}"
                print(f"{name}{r0:10.0f}{r1:10.0f}{a0:9.2f}{a1:9.2f}{b0:9.2f}{b1:9.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
