"""NTLM, [MS-NLMP]: the acceptor, the reader of its messages, their verification, and the accounts that may log in."""
