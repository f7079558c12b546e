"""The command line: ``fasternet <verb>``, one module a verb; errors of users end in one sentence and a status."""

from __future__ import annotations

import io
import os
import sys
import warnings

import typer

from fasternet.cli import (
    bench,
    convert,
    data,
    detect,
    env,
    evaluate,
    info,
    pick,
    predict,
    push,
    quickstart,
    report,
    reproduce,
    results,
    study,
    surgery,
    train,
)

app = typer.Typer(
    help="FasterNet: vision backbones that are fast on your own machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("quickstart")(quickstart.quickstart)
app.command("list")(info.list_)
app.command("info")(info.info)
app.command("predict")(predict.predict)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.add_typer(data.data, name="data")
app.add_typer(detect.detect, name="detect")
app.add_typer(bench.bench, name="bench")
app.command("pick")(pick.pick)
app.add_typer(study.study, name="study")
app.command("surgery")(surgery.surgery)
app.command("convert")(convert.convert)
app.command("push")(push.push)
app.command("report")(report.report)
app.add_typer(reproduce.reproduce, name="reproduce")
app.add_typer(results.results, name="results")
app.command("env")(env.env)


def main() -> None:
    """Run the command line; exit status 0 done, 1 failed with one sentence, 2 wrong arguments.

    ``FASTERNET_DEBUG=1`` shows the traceback behind a sentence.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be UTF-8, nor the terminal
    if os.environ.get("FASTERNET_DEBUG"):
        app()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        app()
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away: nothing is left to say
        sys.exit(1)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    except MemoryError:
        sys.exit("error: out of memory: a smaller --batch-size or input needs less")
    except Exception as error:
        sentence = str(error).splitlines()[0] if str(error) else "no message"
        sys.exit(f"error: unexpected {type(error).__name__}: {sentence} (FASTERNET_DEBUG=1 shows where)")
