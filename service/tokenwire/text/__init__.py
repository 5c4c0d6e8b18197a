"""Text in: tokenizers, chat templates, and the vocabulary bytes from which the engine puts text together again."""

from tokenwire.text.chat import ROLES, ChatTemplate, RenderedChat
from tokenwire.text.errors import (
    ChatTemplateError,
    InvalidTextError,
    TextError,
    TokenizerError,
    UnsupportedTokenizerError,
)
from tokenwire.text.metadata import Metadata
from tokenwire.text.pipeline import TextPipeline, find_tokenizer_json, load_text, load_tokenizer
from tokenwire.text.tokenizer import Tokenizer
from tokenwire.text.vocabulary import TokenizerKind

__all__ = [
    "ROLES",
    "ChatTemplate",
    "ChatTemplateError",
    "InvalidTextError",
    "Metadata",
    "RenderedChat",
    "TextError",
    "TextPipeline",
    "Tokenizer",
    "TokenizerError",
    "TokenizerKind",
    "UnsupportedTokenizerError",
    "find_tokenizer_json",
    "load_text",
    "load_tokenizer",
]
