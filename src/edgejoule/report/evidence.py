"""The evidence below the rankings: stage 1, every measurement, doubts, failures, machines, and what the words mean.

Records in, escaped HTML out. Measures nothing, reads no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from edgejoule.records import Artifact, Caveat, Environment, Failure, Interval, Measurement, Parity, Screened
from edgejoule.report import format as f
from edgejoule.report.cells import BOUNDS, Cell, Head, accuracy_cell, esc, interval_cell, label_cell, number_cell, section, table, text_cell
from edgejoule.report.reproduction import Beside, rank_correlation

SEVERITY = {"reject": "left out", "warn": "warning", "note": "note"}
GLOSSARY = (
    ("Top-1 accuracy", "How often the network's first answer is right, in percent of the images of the data set."),
    (
        "Published, measured",
        "Published: by the network's authors or a results table, on their software. Measured: here. The interval of a measured accuracy is "
        "over the seeds where several were trained (how it would vary if it were trained again, on these test images), else over the test "
        "images (how it would vary with others of their kind).",
    ),
    ("Calibration error", "How far the network's confidence is from how often it is right, on average; 0 % is best."),
    (
        "SAM, Sustainable Accuracy Metric",
        "One score for accuracy and energy together: b × accuracy^a ÷ log10(energy in mJ per image). Higher is better. It has no "
        "meaning at 1 mJ or less.",
    ),
    ("% / mJ", "Top-1 accuracy divided by the energy of one image."),
    ("NetScore", "A score from accuracy, parameters and multiply-adds alone, without a device: 20 × log10(top-1² ÷ √(params × MACs))."),
    ("Params, MACs", "The network's learned numbers (millions), and its multiply-adds for one image (billions)."),
    ("On the front", "No other row is at least as accurate for less (energy or time), so it is a sensible choice for some budget."),
    (
        "Worth it",
        "Of a network that a recipe changed: does a plain one of this ranking do as well? No: one is at least as accurate for no more. "
        "Yes: none is, beyond the 95 % intervals. Not shown: the intervals leave it open. Plain networks that were not run are not in it.",
    ),
    ("Gross and above idle", "Gross energy is all that the sensor saw. Above idle subtracts what the machine draws doing nothing."),
    ("Grade", "How far the energy can be trusted: " + "; ".join(f"{key} {words}" for key, words in f.GRADES.items()) + "."),
    ("Scope", "What the sensor covers: the processor package, the module, the whole board, the wall socket."),
    ("p90, p99", "Nine (ninety-nine) of ten (a hundred) inferences were at least this fast."),
    ("Kendall's tau", "How alike two orders are: 1 the same, 0 unrelated, −1 opposite."),
    (
        "95 % interval",
        "In 95 of 100 such measurements an interval made this way holds the true mean. It covers chance, not the sensor's own error.",
    ),
)


def screened_table(screened: Sequence[Screened]) -> str:
    """Stage 1, kept and rejected."""
    heads = (
        Head("Model", pin=True),
        Head("Top-1", "published, or measured here", True),
        Head("Params", "", True),
        Head("MACs", "", True),
        Head("NetScore", "", True),
    )
    rows = [
        (
            Cell(f'<span class="model">{esc(row.name)}</span>', row.name),
            number_cell(f.top1(row.top1_pct), row.top1_pct, row.accuracy if row.top1_pct is not None else ""),
            number_cell(f.NONE if row.params_m is None else f"{row.params_m:.2f} M", row.params_m),
            number_cell(f.NONE if row.macs_g is None else f"{row.macs_g:.2f} G", row.macs_g),
            number_cell(f.plain_number(row.netscore), row.netscore),
            Cell(
                '<span class="kept">kept</span>' if row.kept else f'<span class="lost">rejected</span> {esc(row.reason)}', str(not row.kept)
            ),
        )
        for row in screened
    ]
    return table((*heads, Head("Verdict")), rows, "Stage 1: candidates by NetScore") if rows else ""


def measurements_table(measurements: Sequence[Measurement]) -> str:
    """Every figure of every measurement, each with its grade and scope in the same row."""
    titles = (
        "Latency",
        "p90",
        "p99",
        "Throughput",
        "Energy / image",
        "above idle",
        "Power",
        "Idle",
        "Images / Wh",
        "First inference",
        "Load",
    )
    heads = [Head("Model", pin=True), *(Head(title, "", True) for title in (*titles, "Peak memory", "Artifact", "Top-1"))]
    heads += [Head(title) for title in ("Weights", "Precision", "Grade", "Scope", "Meter", "Device and workload")]
    rows = [_measurement_row(m) for m in measurements]
    return table(heads, rows, f"Every measurement; {BOUNDS}") if rows else ""


def beside_section(found: Beside) -> str:
    """Latencies measured here beside a printed table's, with their rank correlation."""
    unit = found.column.rpartition("_")[2]
    heads = (Head("Model", pin=True), Head(f"Here, {unit}", "", True), Head(f"Printed, {unit}", "", True), Head("Here / printed", "", True))
    rows = [
        (
            text_cell(row.model),
            number_cell(f.plain_number(row.here), row.here),
            number_cell(f"{row.paper:g}", row.paper),
            number_cell(f.plain_number(row.ratio), row.ratio),
        )
        for row in found.rows
    ]
    about = f"{esc(found.label)}; {esc(rank_correlation(found))}; 1 is the same order, 0 is none."
    if found.unmatched:
        about += f" Not in the printed table: {esc(', '.join(found.unmatched))}."
    return section("Beside the published table", table(heads, rows, f"{found.column} of {found.table}"), about)


def artifacts_table(artifacts: Sequence[Artifact]) -> str:
    """What was compiled, what the runtime says that it runs, and how far it is from the network."""
    heads = [Head("Model", pin=True), Head("Runs as", "read back from the runtime"), Head("Runtime"), Head("Providers")]
    heads += [Head("Same top-1", "on real images, Wilson's interval", True), Head("Error", "largest relative error of the logits", True)]
    heads += [Head("Operators", "where they run, and in what precision"), Head("Chosen while compiling")]
    rows = []
    for a in artifacts:
        parity = a.parity
        rows.append(
            (
                Cell(f'<span class="model">{esc(a.variant.label)}</span><small>{esc(a.backend)}</small>', a.label),
                text_cell(a.info.precision if a.info.precision == a.precision else f"{a.info.precision}, asked for {a.precision}"),
                text_cell(a.info.runtime),
                text_cell(", ".join(a.info.providers)),
                _agreement(parity),
                number_cell(f"{parity.max_rel:.1e}", parity.max_rel) if parity else Cell(f.NONE),
                _wrapped([a.info.placement.words] if a.info.placement else []),
                _wrapped([f"{what}: {chosen}" for what, chosen in a.notes.items()]),
                Cell(f"<code>{esc(a.sha256[:12])}</code>", a.sha256),
            )
        )
    return table((*heads, Head("sha256")), rows, "What was compiled") if rows else ""


def _wrapped(lines: Sequence[str]) -> Cell:
    """Sentences, in a column no wider than a sentence is easily read."""
    return Cell(f'<span class="wrap">{"<br>".join(map(esc, lines))}</span>' if lines else f.NONE, " ".join(lines))


def _agreement(parity: Parity | None) -> Cell:
    if parity is None:
        return Cell(f.NONE)
    found = parity.agreement
    bounds = "" if found is None or found.low is None or found.high is None else f"{found.low:.0%} to {found.high:.0%}"
    return number_cell(f"{parity.top1_agreement:.0%} of {parity.n}", parity.top1_agreement, bounds)


def caveat_cards(found: Iterable[tuple[str, Caveat]]) -> str:
    """Each doubt once, worst first: what was seen and where, why it matters, what to do. What was seen alike everywhere is one line."""
    places: dict[str, dict[str, list[str]]] = {}
    first: dict[str, Caveat] = {}
    for where, doubt in found:
        first.setdefault(doubt.code, doubt)
        wheres = places.setdefault(doubt.code, {}).setdefault(doubt.seen, [])
        if where not in wheres:
            wheres.append(where)
    order = sorted(first.values(), key=lambda doubt: list(SEVERITY).index(doubt.severity))
    return "".join(_card(doubt, [_seen(text, wheres) for text, wheres in places[doubt.code].items()]) for doubt in order)


def _seen(text: str, wheres: Sequence[str]) -> str:
    named = [where for where in wheres if where]
    where = f"{len(named)} measurements" if len(named) > 2 else " and ".join(named)
    return ": ".join(filter(None, (where, text)))


def failures_list(failures: Sequence[Failure]) -> str:
    """What could not go on, and why."""
    items = (f"<li><b>{esc(one.variant)}</b> @ {esc(one.backend)}, {esc(one.stage)}: {esc(one.reason)}</li>" for one in failures)
    return f"<ul class='failures'>{''.join(items)}</ul>" if failures else ""


def environments_list(environments: Sequence[Environment]) -> str:
    """The machines, and the versions of what ran on them."""
    parts = []
    for environment in environments:
        device = environment.device
        facts = {
            "processor": f"{device.cpu}, {device.cores} cores, {device.arch}",
            "accelerator": device.accelerator,
            "memory": f.scaled(device.memory_bytes, f.SIZES),
            "system": device.system,
            "power mode": device.power_mode,
            "governor": device.governor,
            "threads": str(environment.threads),
            "runtime": environment.runtime,
            "fingerprint": environment.fingerprint,
            **dict(sorted(environment.versions.items())),
        }
        lines = "".join(f"<dt>{esc(name)}</dt><dd>{esc(fact)}</dd>" for name, fact in facts.items() if fact)
        parts.append(f'<div class="card"><h3>{esc(device.name)}</h3><dl class="facts">{lines}</dl></div>')
    return "".join(parts)


def glossary() -> str:
    return '<dl class="glossary">' + "".join(f"<dt>{esc(word)}</dt><dd>{esc(meaning)}</dd>" for word, meaning in GLOSSARY) + "</dl>"


def _measurement_row(m: Measurement) -> tuple[Cell, ...]:
    work = (
        f"{m.device} · {m.workload.scenario}, batch {m.workload.batch}, {m.workload.images} · {m.protocol}, {m.repeats} × · {m.inferences}"
    )
    return (
        label_cell(f"{m.variant} @ {m.backend}"),
        interval_cell(m.latency_s, "ms", 1e3) if not m.cameras else _of_cameras(m),
        number_cell(f.scaled(m.p90_s, f.TIMES), m.p90_s),
        number_cell(f.scaled(m.p99_s, f.TIMES), m.p99_s, "needs 1000 inferences" if m.p99_s is None else ""),
        interval_cell(m.throughput_ips, "/s"),
        interval_cell(m.energy_j, "mJ", 1e3, m.grade),
        interval_cell(m.net_energy_j, "mJ", 1e3, m.grade),
        interval_cell(m.power_w, "W", 1.0, m.grade),
        number_cell(f.scaled(m.idle_w, f.POWERS), m.idle_w),
        number_cell(f.plain_number(m.inferences_per_wh), m.inferences_per_wh),
        number_cell(f.scaled(m.first_inference_s, f.TIMES), m.first_inference_s),
        number_cell(f.scaled(m.load_s, f.TIMES), m.load_s),
        number_cell(f.scaled(m.peak_memory_bytes, f.SIZES), m.peak_memory_bytes),
        number_cell(f.scaled(m.artifact_bytes, f.SIZES), m.artifact_bytes),
        _accuracy(m),
        *(text_cell(text) for text in (m.weights, m.precision, m.grade, m.scope, m.meter, f"{work} inferences")),
    )


def _of_cameras(m: Measurement) -> Cell:
    """The median over all cameras, and each one's own below it."""
    each = ", ".join(f.scaled(one.median_s, f.TIMES) for one in m.cameras)
    return number_cell(f.scaled(m.latency_s.value, f.TIMES), m.latency_s.value, f"{len(m.cameras)} cameras: {each}")


def _accuracy(m: Measurement) -> Cell:
    if (found := m.accuracy) is None:
        return Cell(f.NONE)
    bounds = None if found.low is None or found.high is None else Interval(100 * found.value, 100 * found.low, 100 * found.high, 1)
    return accuracy_cell(100 * found.value, found.kind, bounds, found.seeds, found.dataset)


def _card(doubt: Caveat, places: Sequence[str]) -> str:
    shown = "".join(f"<li>{esc(place)}</li>" for place in places[:8])
    title = esc(doubt.code.replace("_", " ").capitalize())
    more = f"<li>and {len(places) - 8} more</li>" if len(places) > 8 else ""
    return (
        f'<article class="card {esc(doubt.severity)}"><h3><span class="badge">{SEVERITY[doubt.severity]}</span> {title}</h3>'
        f"<ul>{shown}{more}</ul><p><b>Why it matters.</b> {esc(doubt.why)}</p><p><b>What to do.</b> {esc(doubt.advice)}</p></article>"
    )
