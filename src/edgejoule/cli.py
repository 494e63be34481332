"""The command line: the table of verbs, and the only place that catches EdgejouleError.

Results go to stdout, all else to stderr; ``--json`` makes stdout one JSON value. Exit 0 on success, 2 on an error that
the user can mend (one sentence), 1 on a bug (its traceback). The verbs import what they need when they run, never before.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, NoReturn

import typer

from edgejoule import __version__
from edgejoule.errors import EdgejouleError
from edgejoule.verbs import evaluating, looking, optimizing, pipeline, results, tracing, training
from edgejoule.verbs.options import print_text

app = typer.Typer(
    help="Find, shrink, compile and measure Vision Transformers for edge devices, and rank them by accuracy per joule.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
zoo_app = typer.Typer(help="The models that edgejoule knows by name.", no_args_is_help=True)
store_app = typer.Typer(help="Look into a results file.", no_args_is_help=True)

app.command()(pipeline.run)
app.command()(pipeline.screen)
app.command()(training.train)
app.command()(optimizing.optimize)
app.command("compile")(pipeline.compile_)
app.command()(pipeline.measure)
app.command()(evaluating.evaluate)
app.command()(tracing.trace)
app.command()(results.rank)
app.command()(results.compare)
app.command()(results.report)
app.command()(results.reproduce)
app.command()(looking.doctor)
app.command(hidden=True)(looking.agent)
app.add_typer(zoo_app, name="zoo")
zoo_app.command("list")(looking.zoo_list)
zoo_app.command("show")(looking.zoo_show)
app.add_typer(store_app, name="store")
store_app.command("info")(results.store_info)

# what the extras bring and a board does without, by the names that are imported
MEASURE = ("PIL", "scipy", "sklearn", "sqlalchemy")
HOST = (*MEASURE, "accelerate", "huggingface_hub", "onnx", "onnxscript", "plotly", "safetensors", "timm", "torch", "torchvision")


def main() -> None:
    """The entry point: maps our errors, and packages that an extra would bring, to one sentence and exit code 2."""
    # Threads that wait spin for a moment and then sleep: libgomp's own patience makes training many times slower where anything else
    # runs, and none at all twice as slow where nothing does (tiny networks). torch reads this once; workers that measure set their own.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        app()
    except EdgejouleError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name not in HOST:
            raise
        board = " (a board that measures artifacts needs only 'edgejoule[measure]', no torch)" if error.name in MEASURE else ""
        _fail(f"this needs {error.name}, which is not installed: pip install 'edgejoule[host]'{board}")
    except OSError as error:
        where = error.filename or "a file"
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            _fail(f"there is no file {str(where)[:60]!r}… ({error.strerror}): expected the name of a file, a folder or a model")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
            raise
        _fail(f"cannot write {where} ({error.strerror}): free some space or choose another folder; what was stored is safe")


def version(wanted: bool) -> None:
    if wanted:
        print_text(__version__)
        raise typer.Exit


@app.callback()
def root(show: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False) -> None:
    """Find, shrink, compile and measure Vision Transformers for edge devices, and rank them by accuracy per joule."""


def _fail(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
