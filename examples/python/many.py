"""Several generations at once over one connection; one is cancelled, one runs out of time."""

from __future__ import annotations

import asyncio
import os

from tokenwire.client import AsyncClient, Token, TokenwireRpcError

QUESTIONS = ["Name a river.", "Name a mountain.", "Name a sea.", "Name a desert."]


async def ask(client: AsyncClient, question: str) -> str:
    answer = await client.generate(messages=[{"role": "user", "content": question}], max_tokens=24, temperature=0)
    return f"{question} {answer.text.strip()!r} ({answer.end.tokens_out} tokens)"


async def stop_after(client: AsyncClient, num_tokens: int) -> str:
    """Cancels a long answer by its id; its stream then ends with an error of its own."""
    seen = 0
    try:
        async for event in client.execute("Once upon a time", max_tokens=1000, seed=1, job_id="a-long-story"):
            if isinstance(event, Token):
                seen += len(event.ids)
                if seen >= num_tokens:
                    result = await client.cancel("a-long-story")
                    print(f"cancel: {result.outcome} after {result.tokens_out} tokens")
    except TokenwireRpcError as error:
        return f"the story ended with {error.code}"
    return "the story came to its end"


async def give_up_after(client: AsyncClient, seconds: float) -> str:
    """The deadline travels with the call: the worker stops computing when it passes."""
    try:
        await client.generate("Once upon a time", max_tokens=1000, seed=1, timeout_s=seconds)
    except TokenwireRpcError as error:
        return f"after {seconds} s: {error.code}"
    return f"done within {seconds} s"


async def main() -> None:
    target = os.environ.get("TOKENWIRE_TARGET", "127.0.0.1:50051")
    async with AsyncClient(target) as client:
        work = [*(ask(client, question) for question in QUESTIONS), stop_after(client, 5), give_up_after(client, 0.3)]
        for line in await asyncio.gather(*work):
            print(line)


if __name__ == "__main__":
    asyncio.run(main())
