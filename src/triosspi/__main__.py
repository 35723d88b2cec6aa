"""``python -m triosspi``: the command line."""

from .service.cli import main

main()
