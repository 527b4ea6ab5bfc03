"""The command line. Commands import what is heavy (torch, llama_cpp) only when they run, so that `--help` is instant.

Exit codes: 0 pass, 1 negative verdict, 2 usage or operation failed, 3 inconclusive.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from qguard_edge import __version__
from qguard_edge.cli import compare as _compare
from qguard_edge.cli import demo as _demo
from qguard_edge.cli import files as _files
from qguard_edge.cli import imatrix as _imatrix
from qguard_edge.cli import lists as _lists
from qguard_edge.cli import packs as _packs
from qguard_edge.cli import plan as _plan
from qguard_edge.cli import scan as _scan
from qguard_edge.cli import verify as _verify
from qguard_edge.cli.console import err, print_json, say, styled
from qguard_edge.cli.convert import command as _convert
from qguard_edge.cli.converter import converter_app
from qguard_edge.cli.lab import lab_app
from qguard_edge.cli.outputs import command
from qguard_edge.cli.stopping import StoppedError, heeding_signals
from qguard_edge.report.document import json_text
from quant_grids.errors import QGuardError

app = typer.Typer(
    name="qguard-edge",
    help="Quantize language models with rounding decisions that keep quantization-conditioned backdoors asleep.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
_demo.register(app)
_convert.register(app)
_scan.register(app)
_compare.register(app)
_files.register(app)
_imatrix.register(app)
_plan.register(app)
_lists.register(app)
_packs.register(app)
_verify.register(app)
app.add_typer(lab_app, name="lab")
app.add_typer(converter_app, name="converter")

FAILED = 2
INTERRUPTED = 130  # what typer exits with on Ctrl-C


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qguard-edge {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and llama.cpp's log.")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Never contact a model hub; also QGUARD_OFFLINE=1.", show_default=False)
    ] = False,
) -> None:
    if offline:
        os.environ |= {"QGUARD_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if debug:
        os.environ["QGUARD_LOG_LEVEL"] = "DEBUG"
    level = os.environ.get("QGUARD_LOG_LEVEL", "WARNING").upper()
    logging.basicConfig(level=level, format="%(name)s: %(message)s", stream=sys.stderr)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: every failure is one sentence on standard error and exit code 2; a signal ends it with 128 + its number."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        with heeding_signals(lambda stop: _end_now(stop, given)):
            code = run(given)
    except StoppedError as stop:  # before the command began, or after its end
        code = _fail(str(stop), given, stop.exit_code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        with command():
            app(args=arguments, prog_name="qguard-edge")
    except SystemExit as done:
        if done.code == INTERRUPTED:
            return _fail("interrupted; nothing was left behind under the final name", arguments, INTERRUPTED)
        usage = getattr(done.__context__, "format_message", None)  # of what click has shown on standard error
        if done.code == FAILED and usage is not None and "--json" in arguments:
            print_json({"status": "error", "error": str(usage())})
        return done.code if isinstance(done.code, int) else 0
    except QGuardError as error:
        return _fail(str(error), arguments)
    except StoppedError as stop:
        return _fail(str(stop), arguments, stop.exit_code)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): no message.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except MemoryError:
        return _fail("there is not enough memory for this; --max-memory limits what learning takes", arguments)
    except OSError as error:
        where = f"{Path(os.fsdecode(error.filename)).name}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", arguments)
    except Exception as error:
        if "--debug" in arguments:
            err.print_exception()
        return _fail(_unexpected(error), arguments)
    return 0


def _unexpected(error: Exception) -> str:
    """What is said of an error that no command expects; llama.cpp may be missing, since it takes a compiler to install it."""
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "llama_cpp":
        from convert.missing import LLAMA_MISSING

        return LLAMA_MISSING
    return f"internal error: {type(error).__name__}: {error} (run with --debug for the traceback)"


def _end_now(stop: StoppedError, arguments: list[str]) -> None:
    """The last act of a process whose main thread does not get to clean up; rich's locks may be held, so without it."""
    from convert.outputs import remove_unfinished

    remove_unfinished()
    os.write(2, f"error: {stop}\n".encode())
    if "--json" in arguments:
        os.write(1, json_text({"status": "error", "error": str(stop)}).encode())


def _fail(message: str, arguments: list[str], code: int = FAILED) -> int:
    say(err, styled("[bold red]error:[/] {message}", message=message))
    if "--json" in arguments:
        print_json({"status": "error", "error": message})
    return code
