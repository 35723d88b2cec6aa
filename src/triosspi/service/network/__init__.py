"""Where a server listens, who may connect, and who a proxy says it is."""
