"""What a user brought cannot be used: the one error that the command line, server and Slicer show as a sentence."""


class InputError(ValueError):
    """Bad input from a user: whose input, what is wrong with its values, where, and what to do.

    The command line prints it as one line and exits with 2, the server answers 4xx with it.
    A programmer's mistake is a plain ``ValueError`` or ``TypeError`` instead.
    """
