"""The official OpenAI package, unchanged, against a tokenwire gateway: pip install openai."""

from __future__ import annotations

import os

from openai import NotFoundError, OpenAI


def main() -> None:
    base_url = os.environ.get("TOKENWIRE_URL", "http://127.0.0.1:8080") + "/v1"
    client = OpenAI(base_url=base_url, api_key=os.environ.get("TOKENWIRE_API_KEY", "not needed without keys"))

    model = client.models.list().data[0].id
    print(f"[{model}]")

    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
        if chunk.usage is not None:
            print(f"\n[{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens]")

    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Say yes or no."}],
        max_tokens=1,
        temperature=0,
        seed=1,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = answer.choices[0].logprobs
    if logprobs is not None and logprobs.content:
        for top in logprobs.content[0].top_logprobs:
            print(f"{top.token!r}: {top.logprob:.2f}")

    try:
        client.chat.completions.create(model="another-model", messages=[{"role": "user", "content": "Hi"}])
    except NotFoundError as error:
        print(f"refused: {error.body['message'] if isinstance(error.body, dict) else error}")


if __name__ == "__main__":
    main()
