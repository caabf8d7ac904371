"""What a user brought cannot be used: the one error that the command line, server and Slicer show as a sentence."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from a user: whose input, what is wrong with its values, where, and what to do.

    The command line prints it as one line and exits with 2, the server answers 4xx with it.
    A programmer's mistake is a plain ``ValueError`` or ``TypeError`` instead.
    """


class TooLarge(InputError):  # noqa: N818 - a verdict, not a fault
    """More than is read into memory, whatever the file is: the server answers 413 with it."""


class UnfitStudy(InputError):  # noqa: N818 - a verdict, not a fault
    """The files are whole and were understood, but they are no CT that the method is for: refused with a reason.

    The command line says so with exit code 3, as for every refused study; the text is a sentence as always.

    Attributes:
        code: stable name for programs, one of ``pe_app.ct.quality.CODES``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[UnfitStudy], tuple[str, str]]:
        """Exceptions come back from other processes by their arguments."""
        return type(self), (self.code, str(self))
