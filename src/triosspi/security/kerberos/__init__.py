"""Kerberos: python-gssapi (`gssapi`), what is demanded of tickets (`tickets`), and what their PACs say (`pac`)."""
