"""What can go wrong between a model's name and its file."""

from __future__ import annotations


class ModelSourceError(Exception):
    """A model cannot be found, fetched or trusted. `str()` is one line for a person.

    Attributes:
        code: the public error code.
        check: the broken rule, upper case, such as MODEL_CHECKSUM_MISMATCH; stable.
    """

    code = "MODEL_LOAD_FAILED"

    def __init__(self, check: str, message: str) -> None:
        super().__init__(message)
        self.check = check
