"""SPNEGO, RFC 4178: the acceptor, and its tokens."""
