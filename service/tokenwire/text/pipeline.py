"""All that the service asks of text: prompts and conversations to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenwire.text.chat import ChatTemplate, RenderedChat
from tokenwire.text.errors import ChatTemplateError, TokenizerError, UnsupportedTokenizerError
from tokenwire.text.gguf_bpe import load_gguf_bpe
from tokenwire.text.hf_json import load_hf_json
from tokenwire.text.metadata import Metadata, get_str
from tokenwire.text.pre_tokenizers import PRE_TOKENIZERS
from tokenwire.text.tokenizer import Tokenizer
from tokenwire.text.vocabulary import TokenizerKind


def load_tokenizer(metadata: Metadata, tokenizer_json: Path | None = None, *, deferred: bool = False) -> Tokenizer:
    """The model's tokenizer: `tokenizer_json` if given, else the one inside the model file.

    Args:
        deferred: leave the part that encodes to `TextPipeline.from_tokenizer`.

    Raises:
        TokenizerError: it is missing or malformed.
        UnsupportedTokenizerError: it is of a kind that tokenwire does not have.
    """
    if tokenizer_json is not None:
        return load_hf_json(tokenizer_json, metadata, deferred=deferred)
    model = get_str(metadata, "tokenizer.ggml.model")
    if model == "gpt2":
        return load_gguf_bpe(metadata, deferred=deferred)
    if model is None:
        raise TokenizerError("tokenizer_missing", "the model file has no tokenizer (tokenizer.ggml.model)")
    if model == "llama":
        raise UnsupportedTokenizerError("tokenizer_model", "SentencePiece tokenizers (gguf-spm) are not supported")
    raise UnsupportedTokenizerError("tokenizer_model", f"tokenizer model {model[:64]!r} is not supported; known: gpt2")


def find_tokenizer_json(metadata: Metadata, model_path: Path) -> Path | None:
    """The tokenizer.json beside a model file whose own tokenizer is missing or unsupported; None otherwise."""
    beside = model_path.with_name("tokenizer.json")
    own = (
        get_str(metadata, "tokenizer.ggml.model") == "gpt2"
        and (get_str(metadata, "tokenizer.ggml.pre") or "default") in PRE_TOKENIZERS
    )
    return beside if not own and beside.is_file() else None


def load_text(metadata: Metadata, model_path: Path) -> TextPipeline:
    """The pipeline of a model file; a tokenizer.json beside it is used where its own tokenizer cannot be.

    Raises:
        TokenizerError: the tokenizer is missing, malformed or (UnsupportedTokenizerError) unsupported.
    """
    return TextPipeline.from_metadata(metadata, find_tokenizer_json(metadata, model_path))


class TextPipeline:
    """Prompts and conversations to token ids.

    Safe to use from several threads. Every call uses the processor for as long as its text is long: call it from a
    worker thread, never from an event loop.

    Attributes:
        tokenizer: the model's.
        chat_error: why conversations cannot be encoded; None if they can.
        warnings: oddities of the files, for the log.

    Raises:
        TokenizerError: of a deferred tokenizer that turns out to be malformed.
    """

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None) -> None:
        self.tokenizer = tokenizer
        self.chat_error: ChatTemplateError | None = None
        self._chat: ChatTemplate | None = None
        warnings = list(tokenizer.warnings)
        try:
            if chat_template is None:
                raise ChatTemplateError("template_missing", "this model has no chat template; send a prompt instead")
            self._chat = ChatTemplate(chat_template, tokenizer)
        except ChatTemplateError as error:
            # A model without a usable template still continues prompts.
            self.chat_error = error
            if chat_template is not None:
                warnings.append(f"conversations are refused: {error}")
        tokenizer.build()
        self.warnings = tuple(warnings)

    @classmethod
    def from_metadata(cls, metadata: Metadata, tokenizer_json: Path | None = None) -> TextPipeline:
        """The pipeline of a model file, with the tokenizer of `tokenizer_json` if given.

        Raises:
            TokenizerError: the tokenizer is missing, malformed or (UnsupportedTokenizerError) unsupported.
        """
        return cls.from_tokenizer(load_tokenizer(metadata, tokenizer_json), metadata)

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, metadata: Metadata) -> TextPipeline:
        """The pipeline of a model file whose tokenizer was loaded before.

        Raises:
            TokenizerError: of a deferred tokenizer that turns out to be malformed.
        """
        return cls(tokenizer, get_str(metadata, "tokenizer.chat_template"))

    @property
    def kind(self) -> TokenizerKind:
        return self.tokenizer.kind

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def stop_token_ids(self) -> list[int]:
        """End-of-generation tokens, ascending."""
        return self.tokenizer.stop_token_ids

    def vocabulary(self) -> list[bytes]:
        """The bytes that each id stands for in text; empty for control tokens."""
        return self.tokenizer.vocabulary()

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt; markers in it are plain text. Begins with BOS where the model asks for it.

        Raises:
            InvalidTextError: a lone surrogate.
        """
        ids = self.tokenizer.encode(text)
        if self.tokenizer.add_bos and self.tokenizer.bos_id is not None:
            return [self.tokenizer.bos_id, *ids]
        return ids

    def count_tokens(self, text: str) -> int:
        """How many tokens a text has, without BOS.

        Raises:
            InvalidTextError: a lone surrogate.
        """
        return len(self.tokenizer.encode(text))

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of a conversation of (role, content) pairs, up to where the model answers.

        Raises:
            ChatTemplateError: the model has no usable template, or it refused this conversation.
            InvalidTextError: a lone surrogate.
        """
        return self.render_chat(messages).ids

    def render_chat(self, messages: Sequence[tuple[str, str]]) -> RenderedChat:
        """A conversation as text and ids; raises as `encode_chat` does."""
        if self._chat is None:
            error = self.chat_error
            raise ChatTemplateError(error.check, str(error)) if error else RuntimeError("no template and no reason")
        return self._chat.render(messages)

    def close(self) -> None:
        """Ends the template's process. Idempotent."""
        if self._chat is not None:
            self._chat.close()
