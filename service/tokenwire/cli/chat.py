"""`tokenwire chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tokenwire.cli import options
from tokenwire.cli.connection import Connection, with_connection
from tokenwire.cli.generate import TextPrinter
from tokenwire.cli.output import ExitCode, note, print_error, print_rpc_error
from tokenwire.client import Client, Message, SamplingParams, TokenwireRpcError

HELP = "/exit leaves, /reset forgets the conversation, /system TEXT sets the system message, Ctrl-C stops an answer"


def chat(
    connection: Connection,
    system: Annotated[str | None, typer.Option(help="System message.", metavar="TEXT")] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
) -> None:
    """Talk with the model. Each line is a turn; the conversation is kept until /reset."""
    params: SamplingParams = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    with connection.client() as client:
        conversation = Conversation(client, connection.target, params, system)
        interactive = sys.stdin.isatty()
        if interactive:
            import readline  # noqa: F401  (gives input() line editing and history)

            note(HELP)
        while conversation.take_line(interactive):
            pass
    raise typer.Exit(ExitCode.FAILED if conversation.failed and not interactive else ExitCode.OK)


app = options.command_app(with_connection(chat))


class Conversation:
    """The turns so far, and what a line of input does to them."""

    def __init__(self, client: Client, target: str, params: SamplingParams, system: str | None) -> None:
        self._client = client
        self._target = target
        self._params = params
        self._system = system
        self._turns: list[Message] = []
        self.failed = False

    def take_line(self, interactive: bool) -> bool:
        """Reads one line and does what it says; False when the conversation is over."""
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return False
        except KeyboardInterrupt:
            if not interactive:
                return False
            note("\n/exit or Ctrl-D leaves")
            return True
        except UnicodeDecodeError as error:
            print_error(f"the line is not valid text: {error.reason}")
            self.failed = True
            return interactive
        return self.obey(line.strip()) if line.startswith("/") else self.answer(line)

    def obey(self, command: str) -> bool:
        name, _, argument = command.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name == "/reset":
            self._turns.clear()
            note("the conversation is forgotten")
        elif name == "/system":
            self._system = argument.strip() or None
            note("the system message is set" if self._system else "there is no system message")
        else:
            note(HELP)
        return True

    def answer(self, line: str) -> bool:
        if not line.strip():
            return True
        question: Message = {"role": "user", "content": line}
        head: list[Message] = [{"role": "system", "content": self._system}] if self._system is not None else []
        printer = TextPrinter(end_line=True)
        try:
            with self._client.execute(messages=[*head, *self._turns, question], **self._params) as stream:
                for event in stream:
                    printer.show(event)
        except KeyboardInterrupt:
            printer.interrupt()
            if not printer.text:
                return True
        except TokenwireRpcError as error:
            printer.fail(error)
            print_rpc_error(error, self._target)
            if error.code == "CONTEXT_LENGTH_EXCEEDED":
                note("/reset starts a new conversation")
            self.failed = True
            return True  # the question is dropped, so it can be asked again
        # A stopped answer stays: the model sees what the person saw.
        self._turns += [question, {"role": "assistant", "content": printer.text}]
        return True
