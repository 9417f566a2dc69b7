"""The errors that the command line shows as one line."""


class UserError(Exception):
    """Something that the user can put right; its message says what and how."""


class DivergedError(UserError):
    """A training whose gradients are no longer finite."""


def one_line(error: BaseException) -> str:
    """Return the error's type and message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
