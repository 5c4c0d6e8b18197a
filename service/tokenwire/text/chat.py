"""From a conversation to token ids, through the model's own chat template.

Control tokens come from the template's text only. To know which characters of a rendering are the template's, every
character of a message's content that any control token contains is replaced, before rendering, by a stand-in that
appears nowhere in the conversation; what comes out is searched for control tokens, and then the stand-ins are put
back. So no content, nor any two contents that a template joins or cuts, can spell a control token.

Stand-ins keep the length and the white space of a content, so templates that trim, measure or cut it work. Templates
that look for words in it (`'</think>' in content`) would no longer find them; those words, the template's own string
constants, are therefore left as they are, as long as every control token keeps at least one character that is always
replaced. A second rendering with the true contents checks the first: if the two differ, because a template did
something else with a content (changed its case, say), the conversation is refused rather than rendered wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenwire.text.errors import ChatTemplateError
from tokenwire.text.renderer import TemplateRenderer
from tokenwire.text.tokenizer import Tokenizer, check_unicode

ROLES = ("system", "user", "assistant")
_FIRST_STAND_IN = 0xF0000
_MAX_WORD_CHARS = 64


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as the model reads it.

    Attributes:
        text: the rendering, for people to look at; it does not show which markers are control tokens.
        ids: its tokens.
    """

    text: str
    ids: list[int]


class ChatTemplate:
    """A chat template and the tokenizer that its control tokens belong to. Safe to use from several threads.

    Args:
        source: the template, in Jinja.
        tokenizer: made whole if it is not yet.

    Raises:
        TokenizerError: of a deferred tokenizer that turns out to be malformed.
        ChatTemplateError: the template is malformed, or fails on a message of one user.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._control = sorted(tokenizer.control_tokens)
        self._alphabet = sorted({char for token in self._control for char in token if not char.isspace()})
        self._source_chars = frozenset(source)
        self._renderer = TemplateRenderer(source)
        try:
            # The renderer's process starts meanwhile.
            tokenizer.build()
            self._renderer.wait_until_ready()
            self._words = _harmless_words(self._renderer.constants, self._control)
            self.render([("user", "Hello")])
        except BaseException:
            self._renderer.close()
            raise

    def render(self, messages: Sequence[tuple[str, str]]) -> RenderedChat:
        """Renders (role, content) pairs, followed by what makes the model answer.

        Raises:
            ChatTemplateError: an unknown role, or the template refused, failed or cost too much.
            InvalidTextError: a lone surrogate in a content.
        """
        for role, content in messages:
            # Roles are trusted text in the rendering: templates build control tokens from them.
            if role not in ROLES:
                raise ChatTemplateError("unknown_role", f"a role must be one of {', '.join(ROLES)}")
            check_unicode(content)
        stand_ins = self._stand_ins(messages)
        disguise = str.maketrans(stand_ins)
        disguised = [(role, self._disguise(content, disguise)) for role, content in messages]
        plain_text, disguised_text = self._renderer.render([self._variables(messages), self._variables(disguised)])
        reveal = {ord(stand_in): char for char, stand_in in stand_ins.items()}
        if disguised_text.translate(reveal) != plain_text:
            message = "the chat template changes the text of a message in a way that is not supported"
            raise ChatTemplateError("template_changes_content", message)
        pieces = self._tokenizer.split_control(disguised_text)
        ids = self._tokenizer.encode_pieces([p.translate(reveal) if isinstance(p, str) else p for p in pieces])
        return RenderedChat(plain_text, ids)

    def close(self) -> None:
        """Ends the rendering process. Idempotent."""
        self._renderer.close()

    def _variables(self, messages: Sequence[tuple[str, str]]) -> dict[str, object]:
        return {
            "messages": [{"role": role, "content": content} for role, content in messages],
            "add_generation_prompt": True,
            "bos_token": self._tokenizer.token_text(self._tokenizer.bos_id),
            "eos_token": self._tokenizer.token_text(self._tokenizer.eos_id),
            "tools": None,
            "documents": None,
        }

    def _stand_ins(self, messages: Sequence[tuple[str, str]]) -> dict[str, str]:
        """For each character of the control tokens, one that neither the conversation nor the template has."""
        taken = self._source_chars.union(*(content for _, content in messages))
        result: dict[str, str] = {}
        candidate = _FIRST_STAND_IN
        for char in self._alphabet:
            while chr(candidate) in taken:
                candidate += 1
            result[char] = chr(candidate)
            candidate += 1
        return result

    def _disguise(self, content: str, table: dict[int, str]) -> str:
        if self._words is None:
            return content.translate(table)
        parts = self._words.split(content)  # words at odd indices
        return "".join(part if index % 2 else part.translate(table) for index, part in enumerate(parts))


def _harmless_words(constants: Sequence[str], control: Sequence[str]) -> re.Pattern[str] | None:
    """Matches the constants that may stay visible in contents.

    None of them overlaps a control token, and from the characters of all together no control token can be spelled.
    """
    visible: set[str] = set()
    words: list[str] = []
    for word in sorted(constants, key=len):
        if not word.strip() or len(word) > _MAX_WORD_CHARS or any(_overlap(word, token) for token in control):
            continue
        wider = visible.union(word)
        if any(all(char in wider or char.isspace() for char in token) for token in control):
            continue
        visible = wider
        words.append(word)
    if not words:
        return None
    return re.compile("(" + "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) + ")")


def _overlap(word: str, token: str) -> bool:
    """Whether some text holds both so that they share characters."""
    if word in token or token in word:
        return True
    lengths = range(1, min(len(word), len(token)))
    return any(word[-n:] == token[:n] or token[-n:] == word[:n] for n in lengths)
