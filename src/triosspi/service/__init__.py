"""The server program: what a deployment needs around the library. An application imports `shutting_down` from here."""

from .serving.lifecycle import shutting_down as shutting_down
