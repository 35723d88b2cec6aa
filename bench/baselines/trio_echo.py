"""The floor: echo over plain TCP, or with a certificate over TLS 1.3, on Trio. One read, one batch, one write.

    python -m baselines.trio_echo [CERTIFICATE_AND_KEY]

A message is its length and itself; what is not a whole message yet waits for the next read.
"""

import ssl
import sys
from functools import partial

import trio

from baselines.prefixed import join, split


async def echo(stream: trio.abc.Stream) -> None:
    rest = b""
    try:
        while data := await stream.receive_some():
            messages, rest = split(rest + data if rest else data)
            if messages:
                await stream.send_all(join(messages))
    except trio.BrokenResourceError:
        pass


async def main(certificate: str | None = None) -> None:
    if certificate is None:
        serve = partial(trio.serve_tcp, echo, 0, host="127.0.0.1")
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(certificate)
        serve = partial(trio.serve_ssl_over_tcp, echo, 0, context, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(serve)
        listener = listeners[0] if certificate is None else listeners[0].transport_listener
        print(f"listening on 127.0.0.1:{listener.socket.getsockname()[1]}", flush=True)


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
