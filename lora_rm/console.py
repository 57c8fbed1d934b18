"""What a person sees: lines, tables and progress, on a terminal or in a log file."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lora_rm.errors import Interrupted, LoraRmError
from lora_rm.processes import IS_FIRST

console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not IS_FIRST)
"""Everything printed goes through it; `console.quiet = True` silences the library."""

SECONDS_BETWEEN_LINES = 10.0
"""In a log file progress is a line every so often, not a bar."""


def say(text: str) -> None:
    """Prints a line."""
    console.print(text, markup=False)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table; the first column is aligned left, the others right."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)


def show_facts(title: str, facts: Mapping[str, object]) -> None:
    """Prints names and values, one a line."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, str(value))
    console.print(table)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the program with the message of a `LoraRmError` instead of a traceback.

    The exit status is 1, or 130 for a training that was stopped and can be resumed.
    """
    try:
        yield
    except LoraRmError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise SystemExit(130 if isinstance(error, Interrupted) else 1) from None
    except KeyboardInterrupt:
        sys.stderr.write("Stopped.\n")
        raise SystemExit(130) from None


@contextmanager
def progress(description: str, total: int, *, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Shows how far a job is; yields a function to call with the amount done since the last call.

    On a terminal it is a bar that goes when the job is done, elsewhere a line every ten seconds, both with the
    time left. A job of a few parts shows nothing.
    """
    if console.is_terminal and total > 8:
        amount_column = DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), amount_column, TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda amount: bar.advance(task, amount)
        return
    done, started = 0, time.monotonic()
    last_line = started

    def advance(amount: int) -> None:
        nonlocal done, last_line
        done += amount
        now = time.monotonic()
        if now - last_line >= SECONDS_BETWEEN_LINES and done:
            last_line = now
            left = timedelta(seconds=round((now - started) * max(total - done, 0) / done))
            parts = f"{done / 2**30:.2f}/{total / 2**30:.2f} GiB" if in_bytes else f"{done}/{total}"
            say(f"{description} {parts}, {left} left")

    yield advance
