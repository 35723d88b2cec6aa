"""One server process: its connections, its sessions, its signals and reloads."""
