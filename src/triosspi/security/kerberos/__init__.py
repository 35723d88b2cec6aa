"""Kerberos through python-gssapi: what is demanded of tickets, and what their PACs say."""
