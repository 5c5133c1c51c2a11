"""The error of data."""


class DataError(ValueError):
    """Data cannot be trained on; the message says where, why, and what to do."""
