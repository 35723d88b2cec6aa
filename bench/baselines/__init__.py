"""Small honest echo servers to compare with, each the best that its way allows. README.md beside `run.py` says how."""
