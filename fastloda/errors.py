"""The error that a private step raises instead of breaking its promise."""


class PrivacyError(ValueError):
    """The model, its graph or its optimizer would void the privacy guarantee; the message names what and what to do."""
