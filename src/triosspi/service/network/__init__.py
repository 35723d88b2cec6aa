"""Where a server listens, and who a proxy says it speaks for."""
