"""The ids and capabilities of the calling thread, and of no other, by raw system calls. Linux only.

`os.setresuid` and its like change every thread of the process. What is here does not; so it must not be called on a
thread that others rely on, such as the event loop's. It is for `triosspi.impersonation` alone.

Everything that sets raises `OSError` when the kernel refuses, with the call's name as ``filename``; ids are checked to be
some: `ValueError` for 4,294,967,295, which would mean "leave as it is", `OverflowError` for what does not fit 32 bits.
"""

from typing import NoReturn

def thread_id() -> int:
    """The kernel's number of the calling thread."""

def user_ids() -> tuple[int, int, int]:
    """The real, effective and saved user id."""

def group_ids() -> tuple[int, int, int]:
    """The real, effective and saved group id."""

def filesystem_ids() -> tuple[int, int]:
    """The user and group id by which files are judged. They follow the effective ones whenever those are set."""

def groups() -> tuple[int, ...]:
    """The supplementary groups, in the kernel's order: ascending."""

def set_groups(groups: tuple[int, ...]) -> None:
    """Replace the supplementary groups. Needs CAP_SETGID."""

def set_group_ids(real: int, effective: int, saved: int) -> None:
    """Set all three group ids, and the file system's to the effective one. Other ids than its own need CAP_SETGID."""

def set_user_ids(real: int, effective: int, saved: int) -> None:
    """Set all three user ids, and the file system's to the effective one. Other ids than its own need CAP_SETUID.

    To go from some root id to none, or from one effective id to another, also changes the capabilities, see
    capabilities(7).
    """

def capabilities() -> tuple[int, int, int]:
    """The effective, permitted and inheritable capabilities, each as bits by capability number."""

def set_capabilities(effective: int, permitted: int, inheritable: int) -> None:
    """Set all three. What leaves the permitted ones is gone for good; what leaves the inheritable ones is ambient no more."""

def ambient() -> int:
    """The ambient capabilities: those that a program keeps that this thread starts."""

def raise_ambient(wanted: int) -> None:
    """Make capabilities ambient that are permitted and inheritable. Others that are ambient stay so."""

def confine(confined: bool) -> None:
    """Have the calling thread's attempts to start what would be who it is fail, or not fail any more.

    That is: a thread, a copy of the process (`os.fork`), and an event loop, which has other threads work for it. They
    raise `RuntimeError`. Programs are started as before, and threads that are not Python's are not seen.
    """

def die(line: bytes) -> NoReturn:
    """Write a line to standard error, unless nobody reads there, and abort the process: no clean-up, no way around it."""
