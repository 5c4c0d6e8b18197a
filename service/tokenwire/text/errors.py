"""What can go wrong with text: a bad model file, a bad request, a template that will not render."""

from __future__ import annotations


class TextError(Exception):
    """An error with a place: `check` names the rule that was broken, `str()` is one line for a person.

    Attributes:
        code: the public error code: MODEL_LOAD_FAILED, UNSUPPORTED_MODEL or INVALID_REQUEST.
        check: the broken rule, in lower case with underscores; stable.
    """

    code = "MODEL_LOAD_FAILED"

    def __init__(self, check: str, message: str) -> None:
        super().__init__(message)
        self.check = check


class TokenizerError(TextError):
    """The tokenizer in the model's files is malformed."""


class UnsupportedTokenizerError(TokenizerError):
    """The tokenizer is well formed, but of a kind that tokenwire does not have."""

    code = "UNSUPPORTED_MODEL"


class InvalidTextError(TextError):
    """Text of a request cannot be encoded. The message never holds the text."""

    code = "INVALID_REQUEST"


class ChatTemplateError(TextError):
    """The model has no usable chat template, or the template refused or failed on this conversation."""

    code = "INVALID_REQUEST"
