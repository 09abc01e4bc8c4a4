"""The command line: `iqtorch --help`.

options   what the commands share
files     formats, quantize, convert, importance, fit, inspect
measure   demo, perplexity, kl, bench, plot
talk      chat
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import torch
import typer
from rich.markup import escape

from ..errors import IQTorchError
from . import files, measure, talk  # noqa: F401 (their commands)
from .options import COMMANDS, err, out

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    help="IQ weight formats, 2 to 6 bits per weight, in PyTorch.",
    epilog="""\
[bold]Examples[/bold]

  iqtorch demo\n
  iqtorch quantize ./my-model ./packed --format iq2_kl --importance imatrix.dat\n
  iqtorch convert ./packed my-model.gguf\n
  iqtorch kl tiny-llama --format iq2_kl\n
  iqtorch chat my-model.gguf\n
  iqtorch inspect ./packed

MODEL is a Hugging Face folder or hub name, a GGUF file, or [bold]tiny-llama[/bold] for the small model inside the package.
Results go to standard output, progress and errors to standard error. Exit code: 0, 1 for an error, 2 for a wrong command line,
130 when interrupted. [bold]iqtorch --install-completion[/bold] makes the shell complete commands, options and formats.""",
)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    from .. import __version__, kernel_info

    info = kernel_info()
    out.print(f"iqtorch {__version__}, PyTorch {torch.__version__}", highlight=False)
    for name, state in info["backends"].items():
        isa = f" ({info['isa']})" if name == "cpu" and info["isa"] else ""
        out.print(f"{name}: {state}{isa}", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and which kernels run here.")
]


@app.callback()
def _options(version: Version = False) -> None: ...


for function, examples in COMMANDS:
    app.command(epilog=examples)(function)


def main() -> None:
    """Entry point: errors of iqtorch and of the file system become one line and exit code 1."""
    try:
        app(prog_name="iqtorch")
    except (IQTorchError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        err.print("[bold red]error:[/bold red]", escape(_message(error)), highlight=False, soft_wrap=True)
        sys.exit(1)


def _message(error: Exception) -> str:
    """The file and what is wrong with it, without the number that Python puts before."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
