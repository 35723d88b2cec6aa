"""Windows-authenticated TCP for Trio: SSPI's Negotiate, then sealed messages."""

__version__ = "0.1.0"
