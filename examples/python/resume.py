"""A job that outlives its client. The first run begins a story and leaves; the second goes on where it stopped.

python resume.py begin > ticket.json     # prints the beginning to stderr, and what is needed to go on to stdout
python resume.py continue < ticket.json  # prints the rest

A stream that merely breaks needs none of this: with `detach=True` the client attaches again by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys

from tokenwire.client import Client, End, Token

TARGET = os.environ.get("TOKENWIRE_TARGET", "127.0.0.1:50051")


def begin() -> None:
    ids: list[int] = []
    with Client(TARGET) as client:
        stream = client.execute("Once upon a time", max_tokens=80, temperature=0.8, seed=3, detach=True)
        for event in stream:
            if isinstance(event, Token):
                ids.extend(event.ids)
                print(event.text, end="", flush=True, file=sys.stderr)
                if len(ids) >= 10:
                    stream.leave()  # `close` would cancel the job
        ticket = {"job_id": stream.job_id, "attach_token": stream.attach_token, "ids": ids}
    json.dump(ticket, sys.stdout)


def go_on() -> None:
    ticket = json.load(sys.stdin)
    ids: list[int] = ticket["ids"]
    with Client(TARGET) as client, client.attach(ticket["job_id"], ticket["attach_token"], len(ids)) as stream:
        for event in stream:
            if isinstance(event, Token):
                ids.extend(event.ids)
                print(event.text, end="", flush=True)
            elif isinstance(event, End):
                # Both halves together are the one stream: its digest is over the ids of both.
                digest = hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()
                print(f"\n[{len(ids)} tokens, the digest {'agrees' if digest == event.digest else 'DIFFERS'}]")


if __name__ == "__main__":
    if sys.argv[1:] not in (["begin"], ["continue"]):
        sys.exit(__doc__)
    begin() if sys.argv[1] == "begin" else go_on()
