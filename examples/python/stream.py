"""Streams the answer to a question: python stream.py "Name three rivers." """

from __future__ import annotations

import os
import sys

from tokenwire.client import Client, End, Metrics, Started, Token, TokenwireRpcError


def main(question: str) -> int:
    target = os.environ.get("TOKENWIRE_TARGET", "127.0.0.1:50051")
    with Client(target, timeout_s=120) as client:
        try:
            with client.execute(
                messages=[{"role": "user", "content": question}], max_tokens=60, temperature=0, seed=7
            ) as stream:
                for event in stream:
                    if isinstance(event, Started):
                        print(f"[{event.model}, {event.prompt_tokens} prompt tokens, seed {event.seed}]")
                    elif isinstance(event, Token):
                        print(event.text, end="", flush=True)
                    elif isinstance(event, Metrics):
                        print(f"\n[first token {event.first_token_ms:.0f} ms, {event.tokens_per_second:.0f} tokens/s]")
                    elif isinstance(event, End):
                        print(f"[{event.tokens_out} tokens, {event.stop_reason}]")
        except TokenwireRpcError as error:
            # A refused request names every field; an overloaded worker says when to come back.
            print(f"{error.code}: {error.message} (correlation id {error.correlation_id})", file=sys.stderr)
            for violation in error.violations:
                print(f"  {violation.field}: {violation.description}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:]) or "Name three rivers."))
