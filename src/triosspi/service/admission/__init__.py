"""Who may connect, who is served first, and what failed logins cost."""
