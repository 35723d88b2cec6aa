"""How account names are folded."""


def simple_upper(text: str) -> str:
    """Upper-case each character that has an upper case of one character; leave the others.

    This is how Windows folds account names: ``straße`` becomes ``STRAßE``, where `str.upper` would
    make it ``STRASSE``, which is another account's name. For the same reason nothing beyond ASCII
    becomes ASCII: the dotless i and the long s stay what they are, as in .NET's invariant culture.
    """
    if text.isascii():
        return text.upper()
    return "".join(map(_upper_character, text))


def _upper_character(character: str) -> str:
    upper = character.upper()
    return upper if len(upper) == 1 and (character.isascii() or not upper.isascii()) else character


class AccountName(str):
    """A user name whose own ``upper`` is `simple_upper`, for code that upper-cases by itself."""

    __slots__ = ()

    def upper(self) -> str:
        """See `simple_upper`."""
        return simple_upper(str(self))
