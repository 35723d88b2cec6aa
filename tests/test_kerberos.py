"""Kerberos: what an accepted ticket must be, what goes wrong and how that is said, and what is sealed.

Against MIT's KDC, with an initiator of MIT's libgssapi in a process of its own. Other implementations:
``test_kerberos_peers.py``.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from forge import OID_KERBEROS, OID_NTLM, Client, neg_token_init, neg_token_resp
from harness import say
from peers.kerberos import ENCTYPES, Kdc, Key, LineContext, read_keytab, write_keytab
from peers.kerberos.fixtures import join
from peers.kerberos.kinds import MIT_RAW, MIT_SPNEGO, KerberosPeerKind
from peers.kerberos.realm import USUAL_FLAGS
from peers.requirements import require
from triosspi import (
    Acceptor,
    AuthenticationError,
    ConfigurationError,
    Initiator,
    PeerIdentity,
    RemoteProtocolError,
    ServerStatistics,
    SSPIChannel,
    UnsealError,
    WireFormat,
    serve_sspi_over_tcp,
)
from triosspi.security import context, native, policy
from triosspi.security.identity import ContextFlag
from triosspi.security.kerberos import tickets as kerberos
from triosspi.security.ntlm.accounts import AccountTable
from triosspi.security.sealers import GSSWrapSealer
from triosspi.session.session import Session
from triosspi.tcp import tickets

Connect = Callable[..., LineContext]

TRAILERS = {17: 60, 18: 60, 19: 64, 20: 72}
AES = {"aes128": 17, "aes256": 18, "aes128-sha2": 19, "aes256-sha2": 20}


@pytest.fixture
def kdc(mit_kdc: Kdc, monkeypatch: pytest.MonkeyPatch) -> Kdc:
    """The realm, with this process in it."""
    join(mit_kdc, monkeypatch)
    return mit_kdc


@pytest.fixture
def connect(kdc: Kdc) -> Iterator[Connect]:
    """Start an initiator of MIT's."""
    require(MIT_RAW)
    with ExitStack() as stack:

        def connect(service: str = "aes256", *, peer: KerberosPeerKind = MIT_RAW, **options: Any) -> LineContext:
            return stack.enter_context(closing(peer.new(kdc.login(service, **options))))

        yield connect


def acceptor(kdc: Kdc, service: str = "aes256", **options: Any) -> Acceptor:
    return Acceptor(**{"keytab": kdc.services[service].keytab, **options})


def log_in(session: Session, initiator: LineContext) -> Session:
    """Pass the tokens; a refusal is an exception."""
    token = initiator.step(None)
    while token:
        answer = say(session, token)
        token = initiator.step(answer) if answer else None
    assert session.established
    return session


def new_session(kdc: Kdc, service: str = "aes256", wire: WireFormat = WireFormat.FRAMED, **options: Any) -> Session:
    return Session(acceptor(kdc, service, **options), wire)


def receive(session: Session, trailer: bytes, ciphertext: bytes) -> list[bytes]:
    body = struct.pack("<I", len(trailer)) + trailer + ciphertext
    session.receive_data(struct.pack("<I", len(body)) + body)
    return session.next_opened()


def sealed(session: Session, message: bytes) -> tuple[bytes, bytes]:
    data = session.seal([message])
    trailer_size = struct.unpack_from("<I", data, 4)[0]
    return data[8 : 8 + trailer_size], data[8 + trailer_size :]


# Who it is


@pytest.mark.parametrize("peer", [MIT_RAW, MIT_SPNEGO], ids=str)
@pytest.mark.parametrize("service", AES)
def test_the_peer_is_known_by_what_its_ticket_says(
    kdc: Kdc, connect: Connect, peer: KerberosPeerKind, service: str
) -> None:
    before = datetime.now(UTC)
    session = log_in(new_session(kdc, service), connect(service, peer=peer))
    identity = session.peer
    assert (identity.principal, identity.name, identity.domain, identity.realm) == (
        f"alice@{kdc.realm}",
        "alice",
        kdc.realm,
        kdc.realm,
    )
    assert identity.mechanism == "kerberos"
    assert session.package_name == "Kerberos"
    assert identity.mutual
    assert not identity.delegated
    assert identity.enctype == ENCTYPES[AES[service]]
    assert identity.expires_at is not None
    assert timedelta(hours=1) < identity.expires_at - before < timedelta(hours=25)
    assert session.sizes.security_trailer == TRAILERS[AES[service]]


def test_delegated_credentials_are_noticed(kdc: Kdc, connect: Connect) -> None:
    flags = ("delegate", "mutual", "replay", "sequence", "conf", "integ")
    peer = log_in(new_session(kdc), connect(flags=flags)).peer
    assert peer.delegated
    assert peer.impersonation_level == "delegation"


def test_without_mutual_authentication_the_peer_is_not_mutual(kdc: Kdc, connect: Connect) -> None:
    session = log_in(new_session(kdc), connect(flags=("replay", "sequence", "conf", "integ")))
    assert not session.peer.mutual
    assert ContextFlag.MUTUAL not in session.peer.flags


# Rows


def test_row_j_an_initiator_without_channel_bindings_is_refused_where_they_are_required(
    kdc: Kdc, connect: Connect
) -> None:
    with pytest.raises(AuthenticationError, match="sent no channel bindings"):
        log_in(new_session(kdc, channel_bindings=b"tls-unique:1"), connect())


def test_row_j_other_channel_bindings_are_refused_and_the_right_ones_pass(kdc: Kdc, connect: Connect) -> None:
    with pytest.raises(AuthenticationError, match="channel bindings"):
        log_in(new_session(kdc, channel_bindings=b"tls-unique:1"), connect(bindings=b"tls-unique:2"))
    log_in(new_session(kdc, channel_bindings=b"tls-unique:1"), connect(bindings=b"tls-unique:1"))
    log_in(new_session(kdc), connect(bindings=b"tls-unique:1"))


def test_row_k_an_ap_req_replayed_byte_for_byte_is_refused_in_words(kdc: Kdc, connect: Connect) -> None:
    token = connect().step(None)
    assert token is not None
    say(new_session(kdc), token)
    with pytest.raises(AuthenticationError, match="Kerberos: 'Request is a replay'"):
        say(new_session(kdc), token)


@pytest.mark.parametrize("wire", [WireFormat.SAMPLE, WireFormat.FRAMED])
@pytest.mark.parametrize("flags", [("conf",), ("conf", "integ"), ("conf", "integ", "replay", "sequence")])
def test_row_p_sealing_alone_is_demanded_where_our_own_sealer_sees_to_the_order(
    kdc: Kdc, connect: Connect, flags: tuple[str, ...], wire: WireFormat
) -> None:
    assert native.available()["kerberos"]
    session = log_in(new_session(kdc, wire=wire), connect(flags=flags))
    assert bool(session.peer.flags & ContextFlag.SEQUENCE) is ("sequence" in flags)


@pytest.fixture(params=["aes256", "rc4"])
def sealed_by_the_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A service whose messages are not sealed natively: for want of the extension, or for its encryption type."""
    if request.param != "rc4":
        monkeypatch.setattr(native, "_sealing", None)
    service: str = request.param
    return service


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        (("conf",), ("REPLAY", "SEQUENCE")),
        (("conf", "integ", "replay"), ("SEQUENCE",)),
        (("conf", "integ", "sequence"), ("REPLAY",)),
        (("conf", "integ", "replay", "sequence"), ()),
    ],
)
def test_row_p_where_the_kerberos_library_seals_it_must_be_told_to_see_to_the_order(
    kdc: Kdc, connect: Connect, sealed_by_the_library: str, flags: tuple[str, ...], missing: tuple[str, ...]
) -> None:
    """It looks at numbers only where the client has asked for that: a replay would open."""
    service = sealed_by_the_library
    log_in(new_session(kdc, service, WireFormat.SAMPLE, allow_rc4=True), connect(service, flags=flags))
    session = new_session(kdc, service, allow_rc4=True)
    if not missing:
        assert isinstance(log_in(session, connect(service, flags=flags))._context._sealer, GSSWrapSealer)
        return
    with pytest.raises(AuthenticationError) as refusal:
        log_in(session, connect(service, flags=flags))
    gss = ", ".join(f"GSS_C_{name}_FLAG" for name in missing)
    sspi = ", ".join(f"ISC_REQ_{name}_DETECT" for name in missing)
    assert str(refusal.value).endswith(f" lacks {', '.join(missing)}: its client must ask for {gss} (SSPI: {sspi})")


def test_row_p2_a_session_key_of_rc4_is_refused_by_default(kdc: Kdc, connect: Connect) -> None:
    with pytest.raises(AuthenticationError, match="encryption type 23, not AES"):
        log_in(new_session(kdc, "rc4"), connect("rc4"))


def test_row_p2_rc4_is_admitted_where_it_is_asked_for_and_seals_both_ways(kdc: Kdc, connect: Connect) -> None:
    initiator = connect("rc4")
    session = log_in(new_session(kdc, "rc4", allow_rc4=True), initiator)
    assert session.peer.enctype == "arcfour-hmac"
    for size in (1, 7, 8, 1000):
        message = bytes(size)
        assert initiator.open(*sealed(session, message)) == message
        assert receive(session, *initiator.seal(message)) == [message]


def test_row_t_a_message_that_is_signed_but_not_encrypted_is_refused(kdc: Kdc, connect: Connect) -> None:
    initiator = connect()
    session = log_in(new_session(kdc), initiator)
    token = initiator.wrap(b"for all to read", confidential=False)
    assert b"for all to read" in token
    with pytest.raises(UnsealError, match="signed but not encrypted"):
        receive(session, token[:16], token[16:])


@pytest.mark.parametrize("sealer", ["ours", "ours, unasked", "the library's", "the library's, rc4"])
@pytest.mark.parametrize("order", [[1], [0, 0], [0, 2], [1, 0], [0, 1, 0]])
def test_a_gap_a_repetition_or_another_order_is_fatal(
    kdc: Kdc, connect: Connect, monkeypatch: pytest.MonkeyPatch, order: list[int], sealer: str
) -> None:
    if sealer == "the library's":
        monkeypatch.setattr(native, "_sealing", None)
    service = "rc4" if "rc4" in sealer else "aes256"
    initiator = connect(service, flags=("conf",) if "unasked" in sealer else USUAL_FLAGS)
    session = log_in(new_session(kdc, service, allow_rc4=True), initiator)
    assert isinstance(session._context._sealer, GSSWrapSealer) is ("library" in sealer)
    records = [initiator.seal(b"%d" % number) for number in range(3)]
    with pytest.raises(UnsealError):
        for number in order:
            assert receive(session, *records[number]) == [b"%d" % number]
    # For ever: not even the right one opens now.
    with pytest.raises(UnsealError):
        receive(session, *records[0])


def test_our_own_message_reflected_is_refused(kdc: Kdc, connect: Connect) -> None:
    session = log_in(new_session(kdc), connect())
    with pytest.raises(UnsealError):
        receive(session, *sealed(session, b"to you"))


# Names and people


def test_with_spns_a_ticket_for_another_name_of_the_keytab_is_refused(kdc: Kdc, connect: Connect) -> None:
    everything = kdc.all_keytab  # type: ignore[attr-defined]
    wanted = kdc.services["aes256"].target
    log_in(Session(Acceptor(keytab=everything, spns=[wanted.upper()]), WireFormat.FRAMED), connect())
    log_in(Session(Acceptor(keytab=everything), WireFormat.FRAMED), connect("aes128"))
    with pytest.raises(AuthenticationError, match="has a ticket for 'host/aes128.mit.test', not for this service"):
        log_in(Session(Acceptor(keytab=everything, spns=[wanted]), WireFormat.FRAMED), connect("aes128"))


def test_a_ticket_that_was_given_another_services_name_is_still_refused(kdc: Kdc, connect: Connect) -> None:
    # The name in front of the encrypted part is signed by nobody. What counts is whose key decrypts it.
    token = connect("aes128").step(None)
    assert token is not None and b"aes128.mit.test" in token
    renamed = token.replace(b"aes128.mit.test", b"aes256.mit.test")
    everything = kdc.all_keytab  # type: ignore[attr-defined]
    wanted = Acceptor(keytab=everything, spns=[kdc.services["aes256"].target])
    with pytest.raises(AuthenticationError):
        say(Session(wanted, WireFormat.FRAMED), renamed)


def test_people_are_admitted_by_name_and_realm(kdc: Kdc, connect: Connect) -> None:
    log_in(new_session(kdc, allow=[f"alice@{kdc.realm}"]), connect())
    log_in(new_session(kdc, allow=[f"*@{kdc.realm}"]), connect())
    for rules in ({"allow": [f"bob@{kdc.realm}"]}, {"deny": [f"*@{kdc.realm}"]}, {"require_groups": ["S-1-5-32-544"]}):
        with pytest.raises(AuthenticationError, match="alice"):
            log_in(new_session(kdc, **rules), connect())


def test_one_acceptor_takes_spnego_raw_kerberos_and_raw_ntlm_and_kerberos_alone_where_told(
    kdc: Kdc, connect: Connect
) -> None:
    both = {"accounts": AccountTable()}
    log_in(new_session(kdc, **both), connect(peer=MIT_SPNEGO))
    log_in(new_session(kdc, **both), connect())
    assert say(new_session(kdc, **both), Client().negotiate()).startswith(b"NTLMSSP")
    alone = new_session(kdc, mechanisms=("kerberos",), **both)
    with pytest.raises(AuthenticationError, match="raw ntlm, which is not enabled"):
        say(alone, Client().negotiate())


def test_kerberos_chosen_against_the_clients_first_offer_needs_its_mech_list_mic(kdc: Kdc, connect: Connect) -> None:
    # Somebody between could have put NTLM first, or taken better mechanisms out.
    token = connect().step(None)
    session = new_session(kdc)
    say(session, neg_token_init(Client().negotiate(), OID_NTLM, OID_KERBEROS))
    assert token is not None
    answer = say(session, neg_token_resp(token=token))
    assert answer
    assert not session.established
    with pytest.raises(AuthenticationError, match="mechListMIC is missing"):
        say(session, neg_token_resp(state=0))


# The keytab


def test_a_replaced_keytab_is_picked_up_without_a_restart(kdc: Kdc, connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "keytab"
    good = Path(kdc.services["aes256"].keytab.removeprefix("FILE:")).read_bytes()
    path.write_bytes(Path(kdc.services["aes128"].keytab.removeprefix("FILE:")).read_bytes())
    credential = Acceptor(keytab=f"FILE:{path}")
    with pytest.raises(AuthenticationError):
        log_in(Session(credential, WireFormat.FRAMED), connect())
    path.write_bytes(good)
    log_in(Session(credential, WireFormat.FRAMED), connect())


@pytest.mark.parametrize("content", [None, b"", b"nonsense"])
def test_a_keytab_that_is_missing_or_none_is_an_error_at_the_start(
    kdc: Kdc, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "keytab"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"no Kerberos keys in FILE:{path}: .*{path}") as caught:
        Acceptor(keytab=f"FILE:{path}")
    assert "\n" not in str(caught.value)


def test_the_default_keytab_is_the_environments(
    kdc: Kdc, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KRB5_KTNAME", kdc.services["aes256"].keytab)
    log_in(Session(Acceptor(mechanisms=("kerberos",)), WireFormat.FRAMED), connect())
    monkeypatch.setenv("KRB5_KTNAME", f"FILE:{tmp_path}/none")
    with pytest.raises(ConfigurationError, match="no Kerberos keys in the default keytab"):
        Acceptor(mechanisms=("kerberos",))


# Refused, in words


def refusal(kdc: Kdc, initiator: LineContext, **options: Any) -> str:
    with pytest.raises(AuthenticationError) as caught:
        log_in(new_session(kdc, **options), initiator)
    text = str(caught.value)
    assert text.isprintable()
    return text


def test_a_ticket_for_a_key_version_that_is_gone_is_refused_in_words(kdc: Kdc, connect: Connect) -> None:
    stale = kdc.stale_keytab  # type: ignore[attr-defined]
    assert "kvno 2" in refusal(kdc, connect("rotated"), keytab=stale)


def test_a_ticket_for_a_service_that_the_keytab_has_not_is_refused_in_words(kdc: Kdc, connect: Connect) -> None:
    text = refusal(kdc, connect("other"), keytab=kdc.services["aes256"].keytab)
    assert "host/other.mit.test@MIT.TEST" in text


def test_a_key_that_is_not_the_tickets_is_refused_in_words(kdc: Kdc, connect: Connect, tmp_path: Path) -> None:
    keys = read_keytab(kdc.services["aes256"].keytab)
    wrong = write_keytab(tmp_path / "keytab", [replace(key, key=bytes(len(key.key))) for key in keys])
    assert isinstance(keys[0], Key)
    assert "ecrypt" in refusal(kdc, connect(), keytab=wrong)


def test_an_expired_ticket_is_refused_in_words(kdc: Kdc) -> None:
    past = kdc.an_hour_ago()  # type: ignore[attr-defined]
    require(MIT_RAW)
    with closing(MIT_RAW.new(past.login("brief"))) as initiator:
        assert "expired" in refusal(kdc, initiator, service="brief")


def test_a_clock_that_is_wrong_is_refused_in_words(kdc: Kdc) -> None:
    past = kdc.an_hour_ago()  # type: ignore[attr-defined]
    require(MIT_RAW)
    with closing(MIT_RAW.new(past.login("aes256"))) as initiator:
        assert "Clock skew too great" in refusal(kdc, initiator)


def test_the_session_ends_with_the_ticket(kdc: Kdc, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    initiator = connect()
    session = log_in(new_session(kdc), initiator)
    record = initiator.seal(b"in time")
    from triosspi.security import context

    lifetime = (session.peer.expires_at - session.peer.authenticated_at).total_seconds()
    now = context.time.monotonic()
    monkeypatch.setattr(context, "time", SimpleNamespace(monotonic=lambda: now + lifetime + 1))
    with pytest.raises(UnsealError, match="ticket has ended"):
        receive(session, *record)
    with pytest.raises(UnsealError, match="ticket has ended"):
        session.seal([b"too late"])
    # But the goodbye is still sealed.
    assert initiator.open(*_split(session.goodbye())) == b""


def _split(frame: bytes) -> tuple[bytes, bytes]:
    size = struct.unpack_from("<I", frame, 4)[0]
    return frame[8 : 8 + size], frame[8 + size :]


# Hostile


def test_an_ap_req_changed_in_any_byte_is_refused_or_the_same_in_effect(kdc: Kdc, connect: Connect) -> None:
    token = connect().step(None)
    rng = random.Random("ap-req")
    credential = acceptor(kdc)
    position, harmless = 0, []
    while token is not None and position < len(token):
        spoiled = bytearray(token)
        spoiled[position] ^= 1 << rng.randrange(8)
        session = Session(credential, WireFormat.FRAMED)
        try:
            say(session, bytes(spoiled))
        except RemoteProtocolError:
            assert not session.established
        else:
            assert session.peer.principal == f"alice@{kdc.realm}"
            harmless.append(position)
            # That one is used up.
            token = connect().step(None)
        position += 1
    # ap-options has reserved bits, and realm, service and key version stand in front of the encrypted part:
    # nothing signs these, and the library goes by the keytab's names.
    first = connect().step(None)
    assert first is not None
    assert max(harmless, default=0) < first.index(b"aes256.mit.test") + 40
    token = connect().step(None)
    assert token is not None
    for size in range(1, len(token), 7):
        with pytest.raises(RemoteProtocolError):
            say(Session(credential, WireFormat.FRAMED), token[:size])
    # None of that has used the ticket up.
    assert say(Session(credential, WireFormat.FRAMED), token)


@pytest.mark.parametrize("peer", [MIT_RAW, MIT_SPNEGO], ids=str)
def test_10000_mutated_tokens_are_refused_or_the_same_in_effect(
    kdc: Kdc, connect: Connect, peer: KerberosPeerKind
) -> None:
    from test_hostile import mutants

    token = connect(peer=peer).step(None)
    assert token is not None
    credential = acceptor(kdc)
    for mutant in mutants(token, str(peer), 5_000):
        session = Session(credential, WireFormat.FRAMED)
        try:
            say(session, mutant)
        except RemoteProtocolError as exc:
            assert str(exc).isprintable()  # noqa: PT017
            continue
        if session.established:
            assert session.peer.principal == f"alice@{kdc.realm}"


# What is sealed


@pytest.mark.parametrize("service", AES)
def test_the_layout_is_sspis_whichever_way_it_was_made(kdc: Kdc, connect: Connect, service: str) -> None:
    # `unwrap_winrm` reads header | data by gss_unwrap_iov, as DecryptMessage does; "iov" makes it so.
    initiator = connect(service, layout="iov")
    session = log_in(new_session(kdc, service), initiator)
    trailer_size = TRAILERS[AES[service]]
    rng = random.Random(service)
    for size in [*range(1, 70), 255, 256, 1000, 4096, 65_535, 65_536, 1_048_576]:
        message = rng.randbytes(size)
        trailer, ciphertext = sealed(session, message)
        assert (len(trailer), len(ciphertext)) == (trailer_size, size)
        # RFC 4121 4.2.6.2: EC 0, and RRC such that what precedes the data is the trailer.
        assert trailer[:8] == bytes.fromhex("050407ff0000") + (trailer_size - 32).to_bytes(2, "big")
        assert initiator.open(trailer, ciphertext) == message
        assert receive(session, *initiator.seal(message)) == [message]


def test_a_goodbye_of_nothing_is_sealed_and_opened(kdc: Kdc, connect: Connect) -> None:
    initiator = connect(layout="iov")
    session = log_in(new_session(kdc), initiator)
    assert initiator.open(*_split(session.goodbye())) == b""
    assert receive(session, *initiator.seal(b"")) == []
    assert session.receive_ended


@pytest.mark.parametrize("by_us", [True, False], ids=["native", "library"])
@pytest.mark.parametrize("layout", ["wrap", "iov"])
def test_a_record_opens_where_its_peer_has_cut_it_and_nowhere_else(
    kdc: Kdc, connect: Connect, monkeypatch: pytest.MonkeyPatch, layout: str, by_us: bool
) -> None:
    # The trailer's length is under no signature: if it could be changed on the way, so could one bit of a record.
    if not by_us:
        monkeypatch.setattr(context, "take_over", lambda *_, **__: None)
    initiator = connect(layout=layout)
    session = log_in(new_session(kdc), initiator)
    trailer, ciphertext = initiator.seal(b"cut")
    assert len(trailer) == 60
    assert receive(session, trailer, ciphertext) == [b"cut"]
    for cut in (0, 1, 16, 44, 59, 61, 63):
        initiator = connect(layout=layout)
        session = log_in(new_session(kdc), initiator)
        token = b"".join(initiator.seal(b"cut"))
        with pytest.raises(UnsealError):
            receive(session, token[:cut], token[cut:])


def test_a_rotation_that_is_a_whole_turn_too_long_does_not_open(
    kdc: Kdc, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 20 bytes of message: what is turned has 64 bytes, and 28 more than that is 28 with one bit changed.
    for sealed_natively in (True, False):
        if not sealed_natively:
            monkeypatch.setattr(context, "take_over", lambda *_, **__: None)
        initiator = connect(layout="iov")
        session = log_in(new_session(kdc), initiator)
        trailer, ciphertext = initiator.seal(bytes(20))
        assert trailer[6:8] == (28).to_bytes(2, "big")
        with pytest.raises(UnsealError):
            receive(session, trailer[:6] + (28 + 64).to_bytes(2, "big") + trailer[8:], ciphertext)


def test_our_rotation_is_byte_compatible_with_unwrap_winrm(kdc: Kdc) -> None:
    import spnego

    service = kdc.services["aes256"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KRB5CCNAME", kdc.ccache())
        patch.setenv("KRB5_KTNAME", service.keytab)
        client = spnego.client(hostname=service.target.partition("/")[2], service="host", protocol="kerberos")
        server = spnego.server(protocol="kerberos")
        answer = server.step(client.step())
        client.step(answer)
    sealer = GSSWrapSealer(client, 60, encrypt=True)
    for size in range(70):
        trailer, ciphertext = sealer.seal(bytes(size))
        assert server.unwrap_winrm(trailer, ciphertext) == bytes(size)
        winrm = server.wrap_winrm(bytes(size))
        assert sealer.open(winrm.header, winrm.data) == bytes(size)


# Our initiator


@pytest.fixture
async def server(kdc: Kdc, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> SimpleNamespace:
    """A live echo server; its port, statistics and log."""

    async def echo(channel: SSPIChannel[trio.SocketStream]) -> None:
        async for message in channel:
            await channel.send(message + b" from " + channel.peer.principal.encode())

    statistics = ServerStatistics()
    listeners = await nursery.start(
        partial(serve_sspi_over_tcp, echo, 0, acceptor(kdc), host="127.0.0.1", statistics=statistics)
    )
    port = listeners[0].transport_listener.socket.getsockname()[1]
    return SimpleNamespace(port=port, statistics=statistics, log=caplog, target=kdc.services["aes256"].target)


async def test_a_handler_is_ended_with_its_peers_ticket_and_the_peer_is_told_goodbye(
    kdc: Kdc, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    real = policy._ticket_peer

    def short_lived(ticket: kerberos.Ticket) -> PeerIdentity:
        return real(replace(ticket, lifetime=0.2))

    async def handler(channel: SSPIChannel[trio.SocketStream]) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(policy, "_ticket_peer", short_lived)
    monkeypatch.setattr(tickets, "NOTICE", 0.1)
    statistics = ServerStatistics()
    listeners = await nursery.start(
        partial(serve_sspi_over_tcp, handler, 0, acceptor(kdc), host="127.0.0.1", statistics=statistics)
    )
    initiator = Initiator(ccache=kdc.ccache(), target=kdc.services["aes256"].target, mechanism="kerberos")
    stream = await trio.open_tcp_stream("127.0.0.1", listeners[0].transport_listener.socket.getsockname()[1])
    async with SSPIChannel(stream, initiator) as channel:
        with pytest.raises(trio.EndOfChannel):
            await channel.receive()
    assert statistics.expired == 1


async def talk(server: SimpleNamespace, **options: Any) -> bytes:
    initiator = Initiator(**{"target": server.target, "mechanism": "kerberos", **options})
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    async with SSPIChannel(stream, initiator) as channel:
        await channel.send(b"hello")
        return await channel.receive()


@pytest.fixture
def keytab_of_alice(kdc: Kdc, tmp_path: Path) -> str:
    from peers.kerberos.realm import find_program, run

    path = tmp_path / "alice.keytab"
    script = f"addent -password -p alice@{kdc.realm} -k 1 -e {ENCTYPES[18]} -f\n{kdc.users['alice']}\nwkt {path}\n"
    run([find_program("ktutil") or "ktutil"], environment={"KRB5_CONFIG": kdc.config}, stdin=script)
    return str(path)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("how", ["password", "ccache", "keytab", "the ticket at hand"])
async def test_our_initiator_logs_in_by_any_credential(
    *,
    kdc: Kdc,
    server: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    keytab_of_alice: str,
    how: str,
    raw: bool,
) -> None:
    principal = f"alice@{kdc.realm}"
    options: dict[str, Any] = {
        "password": {"username": principal, "password": kdc.users["alice"]},
        "ccache": {"ccache": kdc.ccache()},
        "keytab": {"username": principal, "keytab": keytab_of_alice},
        "the ticket at hand": {},
    }[how]
    if not options:
        monkeypatch.setenv("KRB5CCNAME", kdc.ccache())
    assert await talk(server, raw=raw, **options) == b"hello from " + principal.encode()


async def test_negotiate_prefers_kerberos(kdc: Kdc, server: SimpleNamespace) -> None:
    options = {"username": f"alice@{kdc.realm}", "password": kdc.users["alice"], "mechanism": "negotiate"}
    assert await talk(server, **options) == f"hello from alice@{kdc.realm}".encode()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target": "host/nobody.mit.test"}, "host/nobody.mit.test@MIT.TEST not found in Kerberos database"),
        ({"username": "alice@MIT.TEST", "password": "wrong"}, "(?i)password incorrect|preauthentication failed"),
        ({"username": "nobody@MIT.TEST", "password": "x"}, "(?i)client .*not found in Kerberos database"),
        ({"username": "alice@NOWHERE.TEST", "password": "x"}, "(?i)cannot find KDC"),
        ({"ccache": "FILE:/nowhere/ccache"}, "(?i)no (kerberos )?credentials|no such file"),
        (
            {"username": "alice@MIT.TEST", "keytab": "/nowhere/keytab"},
            "(?i)/nowhere/keytab.*not found|no suitable keys|No key table",
        ),
    ],
    ids=["unknown SPN", "wrong password", "unknown user", "no such realm", "no cache", "no keytab"],
)
async def test_our_initiators_failure_is_one_line_in_the_librarys_words(
    kdc: Kdc, server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], reason: str
) -> None:
    if not {"username", "ccache"} & set(options):
        monkeypatch.setenv("KRB5CCNAME", kdc.ccache())
    with pytest.raises(trio.BrokenResourceError, match=reason) as caught:
        await talk(server, **options)
    assert isinstance(caught.value.__cause__, AuthenticationError)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 300


@pytest.fixture
def config_without_kdc(kdc: Kdc, tmp_path: Path) -> Path:
    path = tmp_path / "krb5.conf"
    path.write_text(Path(kdc.config).read_text().replace(f"127.0.0.1:{kdc.port}", "127.0.0.1:1"))
    return path


async def test_a_kdc_that_cannot_be_reached_is_said_to_be(
    kdc: Kdc, server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, config_without_kdc: Path
) -> None:
    monkeypatch.setenv("KRB5_CONFIG", str(config_without_kdc))
    with pytest.raises(trio.BrokenResourceError, match="(?i)cannot contact any KDC"):
        await talk(server, username=f"alice@{kdc.realm}", password=kdc.users["alice"])


async def test_a_refused_ticket_tells_the_client_nothing_and_the_log_everything(
    kdc: Kdc, server: SimpleNamespace
) -> None:
    with pytest.raises(trio.BrokenResourceError, match="login probably refused"):
        await talk(server, ccache=kdc.ccache(), target=kdc.services["other"].target)
    assert "host/other.mit.test@MIT.TEST" in server.log.text
    assert server.statistics.refused == 1
