"""Several processes: the supervisor, and the workers that it looks after."""
