"""What the acceptor must refuse: one claim per known hole, against a session and against a live server.

A and its like name the holes that were measured in a bare pyspnego acceptor.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import trio

from forge import (
    ACCEPT_COMPLETED,
    ALWAYS_SIGN,
    AV_CHANNEL_BINDINGS,
    AV_TARGET_NAME,
    ESS,
    GOOD_FLAGS,
    KEY_128,
    KEY_EXCH,
    OEM,
    OID_KERBEROS,
    OID_NTLM,
    REQUEST_MIC,
    SEAL,
    SIGN,
    UNICODE,
    Client,
    mech_list,
    neg_token_init,
    neg_token_resp,
    response_token,
)
from triosspi import (
    Acceptor,
    Account,
    AuthenticationError,
    Initiator,
    RemoteProtocolError,
    SSPIChannel,
    SSPIStream,
    WireFormat,
    serve_negotiate_stream_over_tcp,
    serve_sspi_over_tcp,
)
from triosspi.security.ntlm.accounts import AccountTable
from triosspi.security.ntlm.primitives import channel_bindings_hash, nt_hash
from triosspi.session import BaseSession, StreamSession
from triosspi.session.session import Session

BINDINGS = b"tls-server-end-point:" + bytes(32)


def accounts() -> AccountTable:
    table = AccountTable()
    for domain, name, password, enabled in [
        ("DOM", "alice", "secret", True),
        ("DOM", "disabled", "secret", False),
        ("", "straße", "secret", True),
    ]:
        table.add(Account(domain, name, nt_hash(password), enabled))
    return table


class Refused(Exception):
    """The acceptor wants no more of this peer."""


class Framed:
    """Tokens as the `framed` format has them, and the sample's."""

    serve: Any = staticmethod(serve_sspi_over_tcp)
    header = 4

    @staticmethod
    def session(acceptor: Acceptor) -> BaseSession:
        return Session(acceptor, WireFormat.FRAMED)

    @staticmethod
    def pack(token: bytes) -> bytes:
        return struct.pack("<I", len(token)) + token

    @staticmethod
    def size(header: bytes) -> int:
        size: int = struct.unpack("<I", header)[0]
        return size

    @staticmethod
    async def greet(channel: SSPIChannel[trio.SocketStream]) -> None:
        await channel.send(b"welcome")


class NegotiateStream:
    """Tokens as .NET's NegotiateStream has them."""

    serve: Any = staticmethod(serve_negotiate_stream_over_tcp)
    header = 5

    @staticmethod
    def session(acceptor: Acceptor) -> BaseSession:
        return StreamSession(acceptor)

    @staticmethod
    def pack(token: bytes) -> bytes:
        return struct.pack(">BHH", 0x16, 0x0100, len(token)) + token

    @staticmethod
    def size(header: bytes) -> int:
        # A refusal of a login that may be tried again has eight bytes, and is one.
        kind, _, size = struct.unpack(">BHH", header)
        if kind == 0x15:
            raise Refused
        return int(size)

    @staticmethod
    async def greet(stream: SSPIStream[trio.SocketStream]) -> None:
        await stream.send_all(b"welcome")


Wire = type[Framed] | type[NegotiateStream]


class SessionTalk:
    """Tokens into a session by hand."""

    def __init__(self, acceptor: Acceptor, wire: Wire) -> None:
        self._wire = wire
        self._session = wire.session(acceptor)

    def say(self, token: bytes, *, answers: bool = True) -> bytes:
        self._session.receive_data(self._wire.pack(token))
        try:
            received = self._session.next_token()
            assert received is not None
            return self._session.step(received)[self._wire.header :]
        except RemoteProtocolError as exc:
            raise Refused(str(exc)) from exc

    def who(self) -> str:
        if not self._session.established:
            raise Refused("not established")
        return self._session.peer.principal

    def close(self) -> None:
        pass


class LiveTalk:
    """Tokens over a socket to a server in another thread, which greets whom it has authenticated."""

    def __init__(self, acceptor: Acceptor, wire: Wire, log: pytest.LogCaptureFixture) -> None:
        self._wire = wire
        self._principals: list[str] = []
        self._log = log
        self._stop: Callable[[], None] = lambda: None
        ready: list[int] = []
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(acceptor, ready, started))
        self._thread.start()
        assert started.wait(10)
        self._socket = socket.create_connection(("127.0.0.1", ready[0]), timeout=10)

    def _run(self, acceptor: Acceptor, ready: list[int], started: threading.Event) -> None:
        async def handler(channel: Any) -> None:
            self._principals.append(channel.peer.principal)
            await self._wire.greet(channel)

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                listeners = await nursery.start(partial(self._wire.serve, handler, 0, acceptor, host="127.0.0.1"))
                ready.append(listeners[0].transport_listener.socket.getsockname()[1])
                token = trio.lowlevel.current_trio_token()
                self._stop = lambda: token.run_sync_soon(nursery.cancel_scope.cancel)
                started.set()

        trio.run(main)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece = self._socket.recv(size - len(data))
            except ConnectionResetError:
                piece = b""
            if not piece:
                raise self._refused()
            data += piece
        return data

    def _refused(self) -> Refused:
        return Refused("\n".join(record.getMessage() for record in self._log.records))

    def say(self, token: bytes, *, answers: bool = True) -> bytes:
        self._socket.sendall(self._wire.pack(token))
        if not answers and self._wire is Framed:
            return b""
        header = self._read(self._wire.header)
        try:
            return self._read(self._wire.size(header))
        except Refused:
            raise self._refused() from None

    def who(self) -> str:
        self._read(4)
        return self._principals[0]

    def close(self) -> None:
        self._socket.close()
        self._stop()
        self._thread.join(10)


Connect = Callable[..., "SessionTalk | LiveTalk"]


@pytest.fixture(params=[Framed, NegotiateStream], ids=["framed", "negotiate-stream"])
def wire(request: pytest.FixtureRequest) -> Wire:
    """The wire format: what is refused is refused on all."""
    chosen: Wire = request.param
    return chosen


@pytest.fixture(params=["session", "live server"])
def connect(request: pytest.FixtureRequest, wire: Wire, caplog: pytest.LogCaptureFixture) -> Iterator[Connect]:
    """Connect to an acceptor made of the given options."""
    caplog.set_level(logging.INFO)
    open_talks: list[SessionTalk | LiveTalk] = []

    def connect(**options: object) -> SessionTalk | LiveTalk:
        acceptor = Acceptor(**{"accounts": accounts(), **options})  # type: ignore[arg-type]
        talk = SessionTalk(acceptor, wire) if request.param == "session" else LiveTalk(acceptor, wire, caplog)
        open_talks.append(talk)
        return talk

    yield connect
    for talk in open_talks:
        talk.close()


def log_in(talk: SessionTalk | LiveTalk, client: Client) -> str:
    """A raw NTLM login; returns the principal."""
    challenge = talk.say(client.negotiate())
    talk.say(client.authenticate(challenge), answers=False)
    return talk.who()


def log_in_by_spnego(
    talk: SessionTalk | LiveTalk, client: Client, *, oids: tuple[bytes, ...] = (OID_NTLM,), send_mic: bool = True
) -> str:
    first_is_ntlm = oids[0] == OID_NTLM
    answer = talk.say(neg_token_init(client.negotiate() if first_is_ntlm else b"\x01\x00guess", *oids))
    if not first_is_ntlm:
        assert OID_NTLM in answer
        answer = talk.say(neg_token_resp(token=client.negotiate()))
    authenticate = client.authenticate(response_token(answer))
    mic = client.mech_list_mic(mech_list(*oids)) if send_mic else None
    state = None if send_mic else ACCEPT_COMPLETED
    talk.say(neg_token_resp(state=state, token=authenticate, mic=mic), answers=send_mic)
    return talk.who()


# What is right passes


def test_a_client_that_does_all_as_windows_does_logs_in(connect: Connect) -> None:
    assert log_in(connect(), Client()) == "DOM\\alice"


def test_a_client_that_does_all_as_windows_does_logs_in_by_spnego(connect: Connect) -> None:
    assert log_in_by_spnego(connect(), Client()) == "DOM\\alice"


def test_a_mic_stands_at_64_where_there_is_no_version_field(connect: Connect) -> None:
    assert log_in(connect(), Client(version_field=False)) == "DOM\\alice"


@pytest.mark.parametrize("size", [48, 80])
def test_a_single_host_pair_of_any_length_passes(connect: Connect, size: int) -> None:
    # Windows 11 from build 26200 on sends 80 bytes where it were 48.
    assert log_in(connect(), Client(extra_pairs=[(8, bytes(size))])) == "DOM\\alice"


# A to A3b: SPNEGO's own word


def test_row_a_accept_completed_without_a_login_authenticates_nobody(connect: Connect) -> None:
    talk = connect()
    talk.say(neg_token_init(Client().negotiate(), OID_NTLM))
    with pytest.raises(Refused, match="nobody has authenticated|AttributeError"):
        talk.say(neg_token_resp(state=ACCEPT_COMPLETED))


def test_row_a_accept_completed_before_any_mechanism_token_authenticates_nobody(connect: Connect) -> None:
    talk = connect()
    talk.say(neg_token_init(None, OID_NTLM))
    with pytest.raises(Refused):
        talk.say(neg_token_resp(state=ACCEPT_COMPLETED))


def test_row_a2_an_exchange_that_begins_with_a_neg_token_resp_is_refused(connect: Connect) -> None:
    with pytest.raises(Refused, match="neither SPNEGO, nor NTLM, nor Kerberos"):
        connect().say(neg_token_resp(state=ACCEPT_COMPLETED))


def test_row_a3_a_neg_token_resp_naming_a_mechanism_never_offered_is_refused(connect: Connect) -> None:
    talk = connect()
    talk.say(neg_token_init(Client().negotiate(), OID_NTLM))
    with pytest.raises(Refused):
        talk.say(neg_token_resp(mech=OID_KERBEROS, token=b"\x01"))


def test_row_a3b_accept_completed_instead_of_the_mech_list_mic_is_refused(connect: Connect) -> None:
    with pytest.raises(Refused, match="mechListMIC is missing"):
        log_in_by_spnego(connect(), Client(), send_mic=False)


def test_row_a3b_a_wrong_mech_list_mic_is_refused(connect: Connect) -> None:
    talk, client = connect(), Client()
    answer = talk.say(neg_token_init(client.negotiate(), OID_NTLM))
    token = client.authenticate(response_token(answer))
    with pytest.raises(Refused, match="BadMICError"):
        # Over another list than was sent: somebody has taken a mechanism out of it.
        talk.say(neg_token_resp(token=token, mic=client.mech_list_mic(mech_list(OID_KERBEROS, OID_NTLM))))


# B: nothing


def test_row_b_an_empty_token_is_refused(connect: Connect) -> None:
    with pytest.raises(Refused, match="empty token"):
        connect().say(b"")


# C: weak responses and weak keys


@pytest.mark.parametrize("level", ["", "0", "1", "5"])
def test_row_c_ntlmv1_is_refused_whatever_the_environment_says(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    if level:
        monkeypatch.setenv("LM_COMPAT_LEVEL", level)
    with pytest.raises(Refused, match="LM or NTLMv1 response"):
        log_in(connect(), Client(nt_form="v1", mic="absent", promise_mic=False))


def test_row_c_an_lm_response_alone_is_refused(connect: Connect) -> None:
    with pytest.raises(Refused, match="LM or NTLMv1 response"):
        log_in(connect(), Client(nt_form="none", lm_response=b"\x01" * 24))


def test_row_c_the_lm_field_beside_an_ntlmv2_response_is_ignored(connect: Connect) -> None:
    assert log_in(connect(), Client(lm_response=b"\x5a" * 24)) == "DOM\\alice"


@pytest.mark.parametrize(
    ("missing", "name"),
    [(ESS, "EXTENDED_SESSIONSECURITY"), (KEY_EXCH, "KEY_EXCH"), (KEY_128, "128"), (SIGN, "SIGN")],
)
@pytest.mark.parametrize("where", ["the final flags", "both messages"])
def test_rows_c2_c3_and_f_a_session_without_its_strong_flags_is_refused(
    connect: Connect, missing: int, name: str, where: str
) -> None:
    weak = GOOD_FLAGS & ~missing
    negotiated = weak if where == "both messages" else GOOD_FLAGS
    with pytest.raises(Refused, match=f"left out .*{name}"):
        log_in(connect(), Client(negotiate_flags=negotiated, flags=weak))


def test_row_c3_a_strong_flag_that_our_challenge_did_not_agree_to_does_not_count(connect: Connect) -> None:
    with pytest.raises(Refused, match="left out 128"):
        log_in(connect(), Client(negotiate_flags=GOOD_FLAGS & ~KEY_128, flags=GOOD_FLAGS))


def test_row_c3_seal_need_not_be_set_and_other_bits_are_ignored(connect: Connect, wire: Wire) -> None:
    flags = (GOOD_FLAGS & ~SEAL & ~ALWAYS_SIGN) | 0x00001000
    client = Client(negotiate_flags=GOOD_FLAGS & ~SEAL, flags=flags)
    # Of a NegotiateStream bare NTLM without it is a client that wants its data unprotected.
    log_in_somehow = log_in if wire is Framed else log_in_by_spnego
    assert log_in_somehow(connect(), client) == "DOM\\alice"


def test_row_c3_bare_ntlm_without_seal_is_refused_where_it_asks_for_no_protection(connect: Connect, wire: Wire) -> None:
    client = Client(negotiate_flags=GOOD_FLAGS & ~SEAL, flags=GOOD_FLAGS & ~SEAL)
    if wire is Framed:
        assert log_in(connect(), client) == "DOM\\alice"
    else:
        with pytest.raises(Refused, match="no protection"):
            log_in(connect(), client)


# D: channel bindings


@pytest.mark.parametrize("sent", [None, bytes(16), b"\x01" * 16, b"short"])
def test_row_d_missing_zero_or_other_channel_bindings_are_refused_where_they_are_required(
    connect: Connect, sent: bytes | None
) -> None:
    pairs = [] if sent is None else [(AV_CHANNEL_BINDINGS, sent)]
    with pytest.raises(Refused, match="channel bindings"):
        log_in(connect(channel_bindings=BINDINGS), Client(extra_pairs=pairs))


def test_row_d_the_right_channel_bindings_pass(connect: Connect) -> None:
    # gss_channel_bindings_struct: two unspecified addresses, then the data, each with its length.
    packed = bytes(16) + struct.pack("<I", len(BINDINGS)) + BINDINGS
    pairs = [(AV_CHANNEL_BINDINGS, channel_bindings_hash(packed))]
    assert log_in(connect(channel_bindings=BINDINGS), Client(extra_pairs=pairs)) == "DOM\\alice"


def test_row_d_zero_channel_bindings_pass_where_none_are_required(connect: Connect) -> None:
    assert log_in(connect(), Client(extra_pairs=[(AV_CHANNEL_BINDINGS, bytes(16))])) == "DOM\\alice"


# E and F: the MIC


@pytest.mark.parametrize("mic", ["wrong", "zero"])
def test_row_e_a_promised_mic_must_be_right(connect: Connect, mic: str) -> None:
    with pytest.raises(Refused, match="MIC of .* is wrong"):
        log_in(connect(), Client(mic=mic))


@pytest.mark.parametrize("version_field", [True, False])
@pytest.mark.parametrize("require_mic", [True, False])
def test_row_e_a_promised_mic_that_was_taken_out_is_refused(
    connect: Connect, version_field: bool, require_mic: bool
) -> None:
    # CVE-2019-1040. With a version field the 16 bytes behind it are the payload's, and no MIC.
    with pytest.raises(Refused, match="MIC of .* (was taken out|is wrong)"):
        log_in(connect(require_mic=require_mic), Client(mic="absent", version_field=version_field))


def test_row_e_a_login_without_a_mic_is_refused_by_default(connect: Connect) -> None:
    with pytest.raises(Refused, match="sends no MIC"):
        log_in(connect(), Client(mic="absent", promise_mic=False))


def test_row_e_a_login_without_a_mic_passes_where_that_is_allowed(connect: Connect) -> None:
    # Its payload stands at 72, where a MIC would be: room in the message proves nothing.
    assert log_in(connect(require_mic=False), Client(mic="absent", promise_mic=False)) == "DOM\\alice"


def test_row_e_under_spnego_a_login_without_a_mic_still_needs_its_mech_list_mic(connect: Connect) -> None:
    client = Client(mic="absent", promise_mic=False)
    with pytest.raises(Refused, match="mechListMIC is missing"):
        log_in_by_spnego(connect(require_mic=False), client, send_mic=False)


def test_row_e_a_flag_cleared_on_the_way_is_refused_by_the_mic(connect: Connect) -> None:
    talk, client = connect(), Client()
    client.negotiate()
    challenge = talk.say(client.negotiate_message[:12] + struct.pack("<I", GOOD_FLAGS & ~SEAL) + bytes(24))
    with pytest.raises(Refused, match="MIC of .* is wrong"):
        talk.say(client.authenticate(challenge), answers=False)
        talk.who()


# G: names


@pytest.mark.parametrize("user", ["\\", "DOM\\alice", "ali:ce", "alice\0", "", "a" * 1025])
def test_row_g_a_user_name_that_no_account_can_have_is_refused_by_name(connect: Connect, user: str) -> None:
    with pytest.raises(Refused, match="can be no user name|anonymous|user name of"):
        log_in(connect(), Client(user=user))


@pytest.mark.parametrize("domain", ["\\", "DO:M", "D\0"])
def test_row_g_a_domain_name_that_no_account_can_have_is_refused_by_name(connect: Connect, domain: str) -> None:
    with pytest.raises(Refused, match="can be no domain name"):
        log_in(connect(), Client(domain=domain))


@pytest.mark.parametrize("raw", [b"\x00\xd8", b"a"])
def test_row_g_a_user_name_that_is_not_utf16_is_refused(connect: Connect, raw: bytes) -> None:
    with pytest.raises(Refused, match="not UTF-16"):
        log_in(connect(), Client(raw_user=raw))


def test_a_login_with_names_in_an_oem_code_page_is_refused(connect: Connect) -> None:
    flags = (GOOD_FLAGS & ~UNICODE) | OEM
    with pytest.raises(Refused, match="OEM|NEGOTIATE_UNICODE"):
        log_in(connect(), Client(flags=flags))


def test_row_g2_the_principal_is_spelled_as_in_the_account_file(connect: Connect) -> None:
    assert log_in(connect(), Client(user="ALICE", domain="dom")) == "DOM\\alice"


# H: one silence


@pytest.mark.parametrize(
    ("client", "reason"),
    [
        (Client(user="mallory"), "no account"),
        (Client(password="wrong"), "wrong password"),
        (Client(user="disabled"), "is disabled"),
        (Client(user="disabled", password="wrong"), "wrong password"),
    ],
    ids=["unknown", "wrong password", "disabled", "disabled and wrong password"],
)
def test_row_h_the_log_has_the_true_reason(connect: Connect, client: Client, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        log_in(connect(), client)


WRONG_PASSWORD = Client(password="wrong")


@pytest.mark.parametrize(
    ("client", "baseline"),
    [
        (Client(user="zelda", password="wrong"), WRONG_PASSWORD),
        (Client(domain="XYZ", password="wrong"), WRONG_PASSWORD),
        (Client(user="disabled", password="wrong"), WRONG_PASSWORD),
        (Client(user="disabled"), WRONG_PASSWORD),
        # Letters beyond ASCII cost what they cost, for an account and for none.
        (Client(user="stroße", domain="PC"), Client(user="straße", domain="PC", password="wrong")),
    ],
    ids=["unknown account", "unknown domain", "disabled", "disabled, right password", "without a domain"],
)
def test_row_h_whoever_is_refused_takes_the_same_steps_as_a_wrong_password(client: Client, baseline: Client) -> None:
    """Each call, ours and the library's: whoever asks must not learn by a clock which accounts there are."""

    def calls(client: Client) -> Counter[str]:
        found: Counter[str] = Counter()

        def profile(frame: Any, event: str, argument: Any) -> None:
            if event == "call":
                found[frame.f_code.co_qualname] += 1
            elif event == "c_call":
                found[argument.__qualname__] += 1

        context = Acceptor(accounts=accounts()).new_context()
        authenticate = client.authenticate(context.step(client.negotiate()))
        sys.setprofile(profile)
        try:
            with pytest.raises(AuthenticationError):
                context.step(authenticate)
        finally:
            sys.setprofile(None)
        return found

    assert calls(client) == calls(baseline)


# R: whose blob it is


@pytest.mark.parametrize("tail", [b"", bytes(4), bytes(8), b"\x01\x02\x03"])
def test_row_r_the_proof_is_verified_over_the_blob_as_it_came(connect: Connect, tail: bytes) -> None:
    # Samba sends nothing after the AV pairs, Windows four zero bytes.
    assert log_in(connect(), Client(blob_tail=tail)) == "DOM\\alice"


@pytest.mark.parametrize("upper", ["STRASSE", "STRAßE"])
def test_row_r2_both_ways_of_upper_casing_are_accepted(connect: Connect, upper: str) -> None:
    assert log_in(connect(), Client(user="straße", domain="PC", upper=upper)) == "straße"


def test_row_r2_a_name_that_only_looks_alike_in_upper_case_is_another(connect: Connect) -> None:
    with pytest.raises(Refused, match="no account"):
        log_in(connect(), Client(user="strasse"))


# S: the optimistic token


def test_row_s_the_guess_for_a_mechanism_that_is_not_chosen_is_ignored(connect: Connect) -> None:
    assert log_in_by_spnego(connect(), Client(), oids=(OID_KERBEROS, OID_NTLM)) == "DOM\\alice"


def test_row_s_then_the_mech_list_mic_is_due(connect: Connect) -> None:
    talk, client = connect(), Client()
    answer = talk.say(neg_token_init(b"guess", OID_KERBEROS, OID_NTLM))
    assert bytes([0xA0, 3, 0x0A, 1, REQUEST_MIC]) in answer
    answer = talk.say(neg_token_resp(token=client.negotiate()))
    token = client.authenticate(response_token(answer))
    with pytest.raises(Refused, match="mechListMIC is missing"):
        talk.say(neg_token_resp(state=ACCEPT_COMPLETED, token=token), answers=False)
        talk.who()


def test_a_client_that_offers_nothing_that_is_enabled_is_refused(connect: Connect) -> None:
    with pytest.raises(Refused, match="no mechanism that is enabled"):
        connect().say(neg_token_init(b"guess", OID_KERBEROS))


def test_raw_tokens_can_be_turned_off(connect: Connect) -> None:
    with pytest.raises(Refused, match="raw ntlm, which is not allowed"):
        connect(allow_raw=False).say(Client().negotiate())
    assert log_in_by_spnego(connect(allow_raw=False), Client()) == "DOM\\alice"


def test_raw_kerberos_is_refused_where_it_is_not_enabled(connect: Connect) -> None:
    with pytest.raises(Refused, match="raw kerberos, which is not enabled"):
        connect().say(b"\x60\x0d" + OID_KERBEROS + b"\x01\x00")


# U: what the client meant


@pytest.mark.parametrize(
    ("require", "named", "passes"),
    [
        ("off", "cifs/other", True),
        ("allow", "cifs/other", False),
        ("allow", None, True),
        ("allow", "HOST/server.EXAMPLE", True),
        ("require", None, False),
        ("require", "", False),
        ("require", "cifs/other", False),
        ("require", "host/Server.example", True),
    ],
)
def test_row_u_a_login_meant_for_another_service_is_refused(
    connect: Connect, require: str, named: str | None, passes: bool
) -> None:
    talk = connect(require_target=require, target_names=frozenset({"host/server.example"}))
    pairs = [] if named is None else [(AV_TARGET_NAME, named.encode("utf-16-le"))]
    if passes:
        assert log_in(talk, Client(extra_pairs=pairs)) == "DOM\\alice"
    else:
        with pytest.raises(Refused, match="not this server"):
            log_in(talk, Client(extra_pairs=pairs))


# O: tokens in logs


def test_row_o_no_token_is_logged_at_debug_unless_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    from triosspi.security.pyspnego_compat import allow_token_logging

    caplog.set_level(logging.DEBUG)

    def begin() -> None:
        log_in_by_spnego(SessionTalk(Acceptor(accounts=accounts()), Framed), Client())
        Initiator(username="alice", password="secret", mechanism="ntlm").new_context().step(None)

    begin()
    assert "TlRMTVNTUA" not in caplog.text  # "NTLMSSP" in base64
    allow_token_logging()
    try:
        begin()
    finally:
        allow_token_logging(False)
    assert "SPNEGO step output: " in caplog.text


# N: the environment and its file


def test_row_n_the_account_file_of_the_environment_is_not_used(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    file = os.path.join(tmp_path, "users")
    with open(file, "w") as f:
        f.write("DOM:mallory:secret\n")
    monkeypatch.setenv("NTLM_USER_FILE", file)
    with pytest.raises(Refused, match="no account"):
        log_in(connect(), Client(user="mallory"))


def test_an_account_source_that_raises_is_one_refused_login(connect: Connect) -> None:
    class Broken:
        may_block = False

        def lookup(self, domain: str, user: str) -> Account | None:
            raise RuntimeError("the database is away")

    with pytest.raises(Refused, match="RuntimeError 'the database is away'"):
        log_in(connect(accounts=Broken()), Client())


def test_the_reason_quotes_a_hostile_name_on_one_line() -> None:
    talk = SessionTalk(Acceptor(accounts=accounts()), Framed)
    with pytest.raises(Refused) as caught:
        log_in(talk, Client(user="x\nERROR forged \x1b[31m" + "y" * 200))
    text = str(caught.value)
    assert text.isprintable() and len(text) < 150
    assert isinstance(caught.value.__cause__, AuthenticationError)
