"""What a deployment adds to the library: the command line, and the applications it can serve."""
