"""SPNEGO's acceptor, RFC 4178."""
