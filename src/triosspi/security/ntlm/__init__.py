"""NTLM's acceptor: [MS-NLMP], read strictly; and the accounts that may log in by it."""
