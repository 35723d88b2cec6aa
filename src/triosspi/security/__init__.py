"""Who the peer is, and what keeps its messages: nothing here knows a socket, a wire format or Trio.

A login passes through these files in this order:

* `credentials`: `Acceptor` and `Initiator`, which make a context for each connection;
* `context`: steps the handshake, and lets nothing but our own errors out;
* `spnego`, and within it `ntlm` or `kerberos`: an acceptor's handshake. An initiator's is pyspnego's (`proxies`). What
  they have in common is in `mechanism`;
* `policy` and `authorization`: whether a finished handshake counts, who the peer is (`identity`), and whether they may
  come in (`rules`);
* `native`, and where there is none `sealers`: what seals and opens the messages from then on.
"""
