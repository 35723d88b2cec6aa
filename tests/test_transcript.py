"""What Microsoft's sample prints, in its words."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
import trio
import trio.testing

from harness import SERVER_MESSAGE, Channel, make_acceptor, make_initiator
from triosspi import SSPIChannel, WireFormat
from triosspi.service.transcript import Transcript, harmless, hex_dump


def print_hex_dump(data: bytes) -> list[str]:
    """PrintHexDump of the sample, statement by statement: a line is an array that is written to by index."""
    printed = []
    index, length = 0, len(data)
    while length:
        count = min(length, 16)
        line = list(f"{index:04x}  ".ljust(100, "?"))  # sprintf_s(rgbLine, 100, "%4.4x  ", index)
        at = 6
        for i in range(count):
            line[at] = "0123456789abcdef"[data[index + i] >> 4]
            line[at + 1] = "0123456789abcdef"[data[index + i] & 0x0F]
            line[at + 2] = ":" if i == 7 else " "
            at += 3
        for _ in range(count, 16):
            line[at : at + 3] = "   "
            at += 3
        line[at] = " "
        at += 1
        for i in range(count):
            byte = data[index + i]
            line[at] = "." if byte < 32 or byte > 126 else chr(byte)
            at += 1
        printed.append("".join(line[:at]))
        length -= count
        index += count
    return printed


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"A", ["0000  41                                               A"]),
        (b"1234567", ["0000  31 32 33 34 35 36 37                             1234567"]),
        # The eighth byte is followed by a colon even where the line ends with it.
        (b"12345678", ["0000  31 32 33 34 35 36 37 38:                         12345678"]),
        (b"123456789", ["0000  31 32 33 34 35 36 37 38:39                       123456789"]),
        (
            b"NTLMSSP\0\x01\0\0\0\x1f ~\x7f",
            ["0000  4e 54 4c 4d 53 53 50 00:01 00 00 00 1f 20 7e 7f  NTLMSSP...... ~."],
        ),
        (
            bytes(range(0xF0, 0x100)) + b"%\\",
            [
                "0000  f0 f1 f2 f3 f4 f5 f6 f7:f8 f9 fa fb fc fd fe ff  ................",
                "0010  25 5c                                            %\\",
            ],
        ),
    ],
    ids=["nothing", "1", "7", "8", "9", "16", "18"],
)
def test_a_dump_has_the_samples_layout(data: bytes, lines: list[str]) -> None:
    assert hex_dump(data).split("\n") == (lines or [""])
    assert print_hex_dump(data) == lines


@pytest.mark.parametrize("length", [15, 17, 31, 255, 256, 0x10000 - 1, 0x10000 + 20])
def test_a_dump_of_any_length_is_the_samples(length: int) -> None:
    # From 0x10000 on the offset has five digits, and the sample's bytes still begin in the seventh column.
    data = bytes(i * 7 & 0xFF for i in range(length))
    assert hex_dump(data).split("\n") == print_hex_dump(data)


def test_what_could_command_a_terminal_is_escaped_and_the_rest_is_left() -> None:
    assert harmless("plain 'quoted' \\ größe 日本") == "plain 'quoted' \\ größe 日本"
    assert harmless("\x1b[2J\n\t\x9b\u202e\r") == r"\x1b[2J\n\t\x9b\u202e\r"
    assert harmless("\x1b[2J\n\t", keep="\n\t") == "\\x1b[2J\n\t"


async def serve_one(
    written: list[str],
    message: bytes = SERVER_MESSAGE,
    *,
    wire: WireFormat = WireFormat.SAMPLE,
    dump_tokens: bool = False,
    **login: str,
) -> None:
    """One connection with a transcript, to its end."""
    client_stream, server_stream = trio.testing.memory_stream_pair()
    transcript = Transcript(written.append, dump_tokens=dump_tokens)
    client: Channel = SSPIChannel(client_stream, make_initiator(**login), wire=wire)
    server: Channel = SSPIChannel(server_stream, make_acceptor(), wire=wire, tracer=transcript)

    async def serve() -> None:
        try:
            await server.do_handshake()
        except trio.BrokenResourceError:
            await trio.aclose_forcefully(server)
            return
        transcript.authenticated(server)
        await server.send(message)
        await server.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        with suppress(trio.BrokenResourceError):
            assert await client.receive() == message
        await client.aclose()


WORDS = r"""Token buffer received \(\d+ bytes\):
Token buffer generated \(\d+ bytes\):
AcceptSecurityContext result = 0x00090312
Token buffer received \(\d+ bytes\):
Token buffer generated \(\d+ bytes\):
AcceptSecurityContext result = 0x00000000
Package Name: NTLM
Client connected as :  DOM\\alice
Data before encryption: This is your server speaking
Length of data before encryption: 28 \nThe message has been encrypted. \ndata after encryption including trailer \(48 bytes\):
 48 encrypted bytes sent. """

DUMP_LINE = re.compile(r"[0-9a-f]{4}  ([0-9a-f]{2}[ :]){1,16} * .{1,16}")


async def test_the_transcript_has_the_samples_words_in_the_samples_order() -> None:
    written: list[str] = []
    await serve_one(written)
    # In two pieces, each whole lines: what other connections write stands between, not within.
    assert len(written) == 2
    assert re.fullmatch(WORDS, "\n".join(written))


async def test_the_sizes_in_the_transcript_are_those_of_the_tokens() -> None:
    written: list[str] = []
    await serve_one(written, dump_tokens=True)
    lines = "\n".join(written).split("\n")
    announced = [
        (at, int(found[1])) for at, line in enumerate(lines) if (found := re.search(r"\((\d+) bytes\):$", line))
    ]
    assert len(announced) == 5
    for at, size in announced:
        dump = lines[at + 1 : at + 1 + -(-size // 16)]
        assert all(DUMP_LINE.fullmatch(line) for line in dump)
        shown = bytes.fromhex("".join(line[6:54].replace(":", " ") for line in dump))
        assert len(shown) == size
    # The last is the record as it was sent.
    assert shown[:8] == b"\x10\0\0\0\x01\0\0\0"
    # Without the dumps it is the transcript that everybody may read.
    assert re.fullmatch(WORDS, "\n".join(line for line in lines if not DUMP_LINE.fullmatch(line)))


async def test_a_refused_login_is_told_in_the_samples_words_and_names_nobody() -> None:
    written: list[str] = []
    await serve_one(written, password="wrong")
    (text,) = written
    assert text.split("\n")[-2:] == [text.split("\n")[3], "Could not authenticate the socket."]
    assert text.startswith("Token buffer received (")
    assert "alice" not in text


async def test_a_connection_without_a_word_could_not_be_authenticated() -> None:
    written: list[str] = []
    Transcript(written.append).closed()
    assert written == ["Could not authenticate the socket."]


async def test_a_message_cannot_forge_a_line_of_the_transcript() -> None:
    written: list[str] = []
    await serve_one(written, b"x\nClient connected as :  DOM\\admin\x1b[2J\xff")
    assert "\nData before encryption: x\\nClient connected as :  DOM\\admin\\x1b[2J\\xff\n" in "\n" + written[1]


async def test_the_goodbye_of_the_framed_format_is_no_message() -> None:
    written: list[str] = []
    await serve_one(written, b"hello", wire=WireFormat.FRAMED)
    assert "\n".join(written).count("Data before encryption") == 1
    assert written[-1].endswith("\n 25 encrypted bytes sent. ")
