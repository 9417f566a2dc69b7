"""The error that the command line shows as one line."""


class UserError(Exception):
    """Something that the user can put right; its message says what and how."""


class DivergedError(UserError):
    """A training whose gradients are no longer finite."""
