"""Whether a prompt and its answer fit the model's context, once the prompt's tokens are counted."""

from __future__ import annotations

from tokenwire.errors import TokenwireError, invalid_request
from tokenwire.rpc.validate import Limits, empty_prompt


def fit_context(num_prompt_tokens: int, max_tokens: int | None, limits: Limits, input_field: str) -> int:
    """The number of tokens to generate, at most, so that prompt and answer fit the context.

    Args:
        input_field: which field held the prompt.

    Raises:
        TokenwireError: INVALID_REQUEST for a prompt without tokens; CONTEXT_LENGTH_EXCEEDED with limit and actual.
    """
    if num_prompt_tokens == 0:
        raise invalid_request([empty_prompt(input_field)])
    if limits.max_tokens_in and num_prompt_tokens > limits.max_tokens_in:
        raise _too_long(f"the prompt has {num_prompt_tokens} tokens", limits.max_tokens_in, num_prompt_tokens)
    wanted = max_tokens if max_tokens is not None else 1
    total = num_prompt_tokens + wanted
    if total > limits.context_length:
        what = f"{num_prompt_tokens} prompt tokens and {wanted} to generate"
        raise _too_long(what, limits.context_length, total)
    if max_tokens is not None:
        return max_tokens
    return min(limits.max_tokens_out, limits.context_length - num_prompt_tokens)


def check_prompt_length(num_prompt_tokens: int, limits: Limits) -> None:
    """Refuses a prompt of token ids that is beyond the context before anything looks at the ids.

    Raises:
        TokenwireError: CONTEXT_LENGTH_EXCEEDED.
    """
    if num_prompt_tokens >= limits.context_length:
        raise _too_long(f"{num_prompt_tokens} prompt tokens", limits.context_length, num_prompt_tokens + 1)


def _too_long(what: str, limit: int, actual: int) -> TokenwireError:
    return TokenwireError("CONTEXT_LENGTH_EXCEEDED", f"{what} exceed the limit of {limit}", limit=limit, actual=actual)
