"""`llmx run --profile`: the run under a trace, then a table and a Chrome trace."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from llmx.cli.common import reason

_SHOWN = 8  # operators of each graph in the table


def profile_option(function: Callable[..., None]) -> Callable[..., None]:
    """--profile FILE for a command that loads a package and runs it."""

    @click.option(
        "--profile",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Say where the time went, by phase and operator, and write it as a Chrome trace.",
    )
    @functools.wraps(function)
    def profiled(*arguments: Any, profile: Path | None, **options: Any) -> None:
        if profile is None:
            function(*arguments, **options)
            return
        profiler = Profiler(profile)
        with profiler.recording():
            function(*arguments, **options)
        profiler.show()

    return profiled


class Profiler:
    """Records the block; afterwards `profile` is what it showed, and FILE is written."""

    def __init__(self, file: Path) -> None:
        """Raises UsageError where `file` cannot be written: before the run rather than after it."""
        if file.is_dir():
            raise click.UsageError(f"--profile names a file, and {file} is a folder.")
        if not file.absolute().parent.is_dir():
            raise click.UsageError(f"--profile: the folder {file.absolute().parent} does not exist.")
        self._file = file
        self.profile: Any = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        from llmx.bench.profile import read, write_chrome_trace
        from llmx.runtime.tracing import Trace

        with tempfile.TemporaryDirectory(prefix="llmx-profile-") as folder:
            start = time.perf_counter()
            with Trace(Path(folder)) as trace:
                yield
                self.profile = read(trace, start, time.perf_counter())
        try:
            write_chrome_trace(self.profile, self._file)
        except OSError as error:
            raise click.ClickException(f"{self._file} cannot be written: {reason(error)}.") from None

    def show(self) -> None:
        """The tables, on standard error."""
        from rich.console import Console
        from rich.table import Table

        console = Console(stderr=True, highlight=False)
        table = Table("phase", title=f"{self.profile.seconds * 1e3:,.0f} ms", title_justify="left")
        for column in ("calls", "ms", "share", "of it in onnxruntime, ms"):
            table.add_column(column, justify="right")
        for p in self.profile.phases:
            share = p.seconds / self.profile.seconds
            run = f"{p.in_run * 1e3:,.1f}" if p.in_run else ""
            name = f"  {p.name}" if p.part else p.name
            table.add_row(name, f"{p.calls:,}", f"{p.seconds * 1e3:,.1f}", f"{share:.1%}", run)
        console.print(table)
        table = Table("graph")
        table.add_column("operator", no_wrap=True)
        for column in ("calls", "ms", "of graph", "µs a call"):
            table.add_column(column, justify="right")
        for graph in dict.fromkeys(o.graph for o in self.profile.operators):
            found = [o for o in self.profile.operators if o.graph == graph]
            for o in found[:_SHOWN]:
                each = f"{o.seconds / o.calls * 1e6:,.1f}"
                table.add_row(graph, o.operator, f"{o.calls:,}", f"{o.seconds * 1e3:,.1f}", f"{o.share:.1%}", each)
            rest = found[_SHOWN:]
            if rest:
                seconds, calls = sum(o.seconds for o in rest), sum(o.calls for o in rest)
                share = f"{sum(o.share for o in rest):.1%}"
                table.add_row(graph, f"{len(rest)} others", f"{calls:,}", f"{seconds * 1e3:,.1f}", share, "")
            table.add_section()
        console.print(table)
        click.echo(
            f"Time line: {self._file} (chrome://tracing, Perfetto). Profiling operators slows the graphs down a little.",
            err=True,
        )
