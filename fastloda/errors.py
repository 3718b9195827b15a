"""The errors that a user can mend: each message names what is wrong and what to do."""


class UserError(ValueError):
    """An argument, a setting or a file can't be what it is."""


class PrivacyError(UserError):
    """The model, its graph or its optimizer would void the privacy guarantee."""
