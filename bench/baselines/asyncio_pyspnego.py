"""What one writes by hand today: asyncio streams, and pyspnego for the login and every message.

    python -m baselines.asyncio_pyspnego [--seal wrap]

It speaks the framed format. Who may log in is in NTLM_USER_FILE or KRB5_KTNAME. A batch per read, like everybody here.
Messages open by `unwrap`, which costs Kerberos an eighth of `unwrap_winrm`. They are sealed by `wrap_winrm`, whose
layout is the one that Windows makes; with `--seal wrap` by `wrap`, which is cheaper with Kerberos, and whose layout not
every peer reads (with NTLM there is no difference).
"""

import argparse
import asyncio
import struct
from collections.abc import Callable
from functools import partial

import spnego

from baselines.prefixed import READ_SIZE, join, split

_pack = struct.Struct("<I").pack

Seal = Callable[[spnego.ContextProxy, bytes], tuple[bytes, bytes]]


def seal_by_winrm(context: spnego.ContextProxy, message: bytes) -> tuple[bytes, bytes]:
    header, data, _ = context.wrap_winrm(message)
    return header, data


def seal_by_wrap(context: spnego.ContextProxy, message: bytes) -> tuple[bytes, bytes]:
    token = context.wrap(message).data
    cut = len(token) - len(message)
    return token[:cut], token[cut:]


async def log_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> spnego.ContextProxy:
    context = spnego.server(protocol="negotiate", options=spnego.NegotiateOptions.use_negotiate)
    while not context.complete:
        token = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "little"))
        if answer := context.step(token):
            writer.write(_pack(len(answer)) + answer)
    return context


async def echo(
    seal: Seal, context: spnego.ContextProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    unwrap = context.unwrap
    rest = b""
    while data := await reader.read(READ_SIZE):
        frames, rest = split(rest + data if rest else data)
        answers = []
        for frame in frames:
            message = unwrap(frame[4:]).data
            if not message:  # the goodbye
                return
            trailer, ciphertext = seal(context, message)
            answers.append(_pack(len(trailer)) + trailer + ciphertext)
        writer.write(join(answers))
        await writer.drain()


async def serve_client(seal: Seal, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        await echo(seal, await log_in(reader, writer), reader, writer)
    except ConnectionError:
        pass
    finally:
        writer.close()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seal", choices=["winrm", "wrap"], default="winrm")
    seal = seal_by_wrap if parser.parse_args().seal == "wrap" else seal_by_winrm
    server = await asyncio.start_server(partial(serve_client, seal), "127.0.0.1", 0, backlog=1024)
    print(f"listening on 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
