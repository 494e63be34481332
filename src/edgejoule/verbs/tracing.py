"""The verb that reads a power trace: trace. It measures nothing, and opens what instruments and loggers wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgejoule.errors import SpecError
from edgejoule.progress import Progress
from edgejoule.verbs.options import Json, check_finite, print_json, print_text

STEP = 5  # percent between two lines of progress


def trace(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What a power meter or a logger wrote, as text.")],
    spelling: Annotated[str, typer.Option("--format", help="auto, or a format such as monsoon or csv.")] = "auto",
    start: Annotated[float | None, typer.Option(help="Where the window begins, in seconds from the first sample.")] = None,
    stop: Annotated[float | None, typer.Option(help="Where it ends. Default: the whole trace; what lies outside it is idle.")] = None,
    segments: Annotated[int | None, typer.Option(help="Find exactly so many inferences and give the energy of each.")] = None,
    k: Annotated[float, typer.Option(help="Deviations above the background at which an inference begins.")] = 6.0,
    interval: Annotated[float | None, typer.Option(help="Seconds between samples: wins over stamps in the file.")] = None,
    voltage: Annotated[float | None, typer.Option(help="Volts, where the file holds only currents.")] = None,
    time_col: Annotated[str, typer.Option(help="The column of stamps, by its name or its number.")] = "",
    power_col: Annotated[str, typer.Option(help="The column of power.")] = "",
    voltage_col: Annotated[str, typer.Option(help="The column of voltage.")] = "",
    current_col: Annotated[str, typer.Option(help="The column of current.")] = "",
    time_unit: Annotated[str, typer.Option(help="s, ms, us, ns, min or h.")] = "",
    power_unit: Annotated[str, typer.Option(help="W, mW or uW.")] = "",
    voltage_unit: Annotated[str, typer.Option(help="V or mV.")] = "",
    current_unit: Annotated[str, typer.Option(help="A, mA or uA.")] = "",
    decimal: Annotated[str, typer.Option(help="The decimal sign: . or ,")] = "",
    plot: Annotated[Path | None, typer.Option(help="Also draw power, background and inferences into this HTML page.")] = None,
    as_json: Json = False,
) -> None:
    """Integrate a recorded power trace: joules per rail, above idle, and per inference."""
    from edgejoule.measure.recording import open_recording
    from edgejoule.measure.traced import traced
    from edgejoule.plain import encode
    from edgejoule.report import traces
    from edgejoule.report.page import write_page
    from edgejoule.seams import TraceHints

    check_finite(start=start, stop=stop, k=k, interval=interval, voltage=voltage)
    if decimal not in ("", ".", ","):
        raise SpecError(f"--decimal {decimal!r}: expected . or ,")
    columns = (time_col, power_col, voltage_col, current_col)
    units = (time_unit, power_unit, voltage_unit, current_unit)
    hints = TraceHints(interval, voltage, *columns, *units, decimal)
    with Progress() as progress:
        recording = open_recording(file, spelling, hints, _Steps(progress, file.name))
        seen = traced(recording, start, stop, segments, k)
    if plot is not None:
        behind = (seen.found.background.power_w, seen.found.threshold_w) if seen.found else ()
        power = (seen.curve.times_s, seen.curve.power_w) if seen.curve else None
        write_page(plot, traces.plot_page(seen.energy, file.name, power, *behind))
    if as_json:
        print_json(encode(seen.energy) | ({"plot": str(plot)} if plot else {}))
    else:
        print_text(traces.trace_text(seen.energy, file.name) + (f"plot     {plot}\n" if plot else ""))


class _Steps:
    """Tells of the share that has been read, now and then: short files need no progress."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._name = name
        self._next = 0

    def __call__(self, share: float) -> None:
        from edgejoule.bench import Event

        percent = int(100 * share)
        if percent >= self._next:
            self._next = percent + STEP
            self._progress.notify(Event("read", f"% of {self._name}", percent, 100))
