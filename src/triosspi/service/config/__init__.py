"""What can be set of a server, where it is read from, and what is made of it."""
