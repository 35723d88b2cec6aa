"""What holds for every test."""

from peers.fixtures import no_public_realms  # noqa: F401 - an autouse fixture
