"""Who the peer is: contexts, policy, accounts, credentials.

Nothing here knows a socket, a wire format or Trio.
"""
