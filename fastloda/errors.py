"""Errors that a user can fix: each message says what is wrong and what to do."""


class UserError(ValueError):
    """An error in an argument, a setting or a file."""


class PrivacyError(UserError):
    """An error of a model, a graph or an optimizer that would void the privacy guarantee."""
