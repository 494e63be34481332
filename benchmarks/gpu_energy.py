"""The 13 models of the E3P-ViT study on an NVIDIA GPU: NVML's energy counter against its integrated power, and the ranking by SAM.

    python benchmarks/gpu_energy.py [--minutes 9] [--profile 'quick(window_s=3.0)'] [--out docs/results]

Goal: counter and integrated power agree within 5 %. Each model runs as the backend ``eager`` runs it on the GPU (fp32, batch 1, random
weights, which change neither latency nor energy), a fresh process a repeat, the repeats interleaved at random; when the minutes are
over, what was measured is ranked with the published top-1. Beside it stands what is public of the paper's two devices: SAM5 of their
best models and the energies that it implies, not its tables. Writes gpu_energy_<date>.json and .md. Without a GPU, or NVML, it says so
and exits 0. Needs the host extra, but no database and no network; from source: PYTHONPATH=src.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights are random: nothing is to be fetched

from edgejoule import compiling, registry, stages
from edgejoule.accuracies import published_accuracy
from edgejoule.bench import Bench, cores
from edgejoule.catalog import find_model
from edgejoule.errors import EdgejouleError, MeterError
from edgejoule.measure.energy import BESIDE, COUNTER, integrate, pad_s
from edgejoule.measure.environment import environment
from edgejoule.measure.plan import next_round, trial_key
from edgejoule.measure.protocols import profile
from edgejoule.measure.stats import t_interval
from edgejoule.measure.summary import summarise
from edgejoule.plain import encode
from edgejoule.rank.groups import entries_from_measurements
from edgejoule.rank.ranking import rank_groups
from edgejoule.records import Artifact, Failure, Interval, Measurement, ModelSpec, Ranking, Trial
from edgejoule.reproduce import e3p
from edgejoule.reproduce.checks import as_printed
from edgejoule.study_file import MeasurePlan, load_study

ON_GPU = 'eager(device="cuda")'
METER = "nvml"
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Pair:
    """One repeat's joules by the counter and by the integral of power over the same padded window."""

    model: str
    repeat: int
    counted_j: float
    integrated_j: float

    @property
    def ratio(self) -> float:
        return self.counted_j / self.integrated_j


@dataclass(frozen=True)
class Agreement:
    """Counter over integrated power: the geometric mean over models and its interval, and the repeat that is furthest off."""

    ratio: Interval
    furthest: Pair
    within: bool


# ---------------------------------------------------------------- measuring


def missing(backend: str) -> str | None:
    """One sentence where this machine cannot do it."""
    lacking = [registry.create(kind, spelling).probe() for kind, spelling in (("backend", backend), ("meter", METER))]
    return next((sentence for sentence in lacking if sentence is not None), None)


def candidates(names: Sequence[str]) -> tuple[ModelSpec, ...]:
    """The models that are named, or the study's pool after its screening, best NetScore first."""
    plan = load_study("e3p_vit").screen
    if names:
        return tuple(find_model(name) for name in names)
    specs = {spec.name: spec for spec in stages.candidates(plan)}
    return tuple(specs[row.name] for row in stages.screen_models(tuple(specs.values()), plan, Bench()) if row.kept)


def compiled(specs: Sequence[ModelSpec], backend: str, plan: MeasurePlan, bench: Bench, until: float) -> Iterator[Artifact | Failure]:
    for spec in specs:
        if time.monotonic() > until:
            yield Failure(spec.name, backend, "compile", "the minutes were over")
            continue
        for result in compiling.compile_model(spec, [backend], plan, "random", bench):
            print(f"compile: {result.label if isinstance(result, Artifact) else result}", flush=True)
            yield result


def measured(artifacts: Sequence[Artifact], plan: MeasurePlan, bench: Bench, until: float) -> tuple[dict[str, list[Trial]], list[Failure]]:
    """Rounds of repeats by the product's own plan, until it is content or the minutes are over -> {label: repeats}, and what failed."""
    protocol, threads = profile(plan.profile), cores(plan.threads)
    fingerprint = environment(threads).fingerprint
    entered = {entrant.artifact.label: entrant for entrant in stages.entrants(artifacts, plan, bench)}
    trials: dict[str, list[Trial]] = {label: [] for label in entered}
    failures: list[Failure] = []
    while (waiting := next_round(trials, tuple(entered), protocol, bench.seed)) and time.monotonic() < until:
        for label in waiting:
            if time.monotonic() >= until:
                break
            entrant, repeat = entered[label], len(trials[label])
            key = trial_key(entrant.artifact.sha256, entrant.workload, protocol, fingerprint, entrant.meter, repeat)
            try:
                trials[label].append(stages.run_trial(entrant, key, protocol, threads, repeat, bench))
                print(f"measure: {label}, repeat {repeat + 1}", flush=True)
            except EdgejouleError as error:
                failures.append(Failure(entrant.artifact.variant.label, entrant.artifact.backend, "measure", str(error)))
                print(f"measure: {label} failed: {error}", flush=True)
                del entered[label]
    return {label: found for label, found in trials.items() if found}, failures


# ---------------------------------------------------------------- what the trials say


def pair_of(model: str, trial: Trial) -> Pair | None:
    """Both figures of one repeat; None where the board has one of them only, or the trace does not cover the padded window."""
    counter = next((trace for trace in trial.traces if trace.total and trace.quantity == "energy_j"), None)
    power = next((t for t in trial.traces if counter is not None and t.rail == counter.rail + BESIDE and t.quantity == "power_w"), None)
    window = trial.phase("window")
    if counter is None or power is None or window is None:
        return None
    pad = max(pad_s(counter), pad_s(power))
    counted, integrated = (integrate(trace, window.start_s - pad, window.stop_s + pad) for trace in (counter, power))
    if counted is None or integrated is None or counted <= 0 or integrated <= 0:
        return None
    return Pair(model, trial.repeat, counted, integrated)


def agreement(pairs: Sequence[Pair]) -> Agreement | None:
    """Over models, because repeats of one model err alike; None where there is no pair."""
    if not pairs:
        return None
    by_model: dict[str, list[float]] = {}
    for pair in pairs:
        by_model.setdefault(pair.model, []).append(math.log(pair.ratio))
    logs = t_interval([sum(found) / len(found) for found in by_model.values()])
    bounds = [None if bound is None else math.exp(bound) for bound in (logs.low, logs.high)]
    furthest = max(pairs, key=lambda pair: abs(math.log(pair.ratio)))
    return Agreement(Interval(math.exp(logs.value), bounds[0], bounds[1], logs.n), furthest, abs(furthest.ratio - 1) <= COUNTER)


def summaries(trials: dict[str, list[Trial]], artifacts: Sequence[Artifact]) -> tuple[tuple[Measurement, ...], tuple[Pair, ...]]:
    by_label = {artifact.label: artifact for artifact in artifacts}
    found, pairs = [], []
    for label, repeats in trials.items():
        artifact = by_label[label]
        spec = artifact.variant.spec
        found.append(summarise(repeats, artifact, published_accuracy(spec)))
        pairs += [pair for trial in repeats if (pair := pair_of(spec.name, trial)) is not None]
    return tuple(found), tuple(pairs)


def ranked(found: Sequence[Measurement]) -> Ranking:
    """By SAM5. Raises MeterError where no model has an energy."""
    groups = entries_from_measurements(found)
    if not groups:
        raise MeterError("no model's energy could be measured: see the failures and caveats in the JSON file")
    return rank_groups(groups, metric="sam", a=e3p.A, b=e3p.B)[0]


def in_public() -> dict[str, tuple[str, str]]:
    """What the paper's abstract says of a model (by its catalog name) on RTX 3050 and on TX2, with the energy that it implies."""
    implied = e3p.energy_of(as_printed(e3p.RTX_IMAGENET), e3p.top1_of(e3p.TINY))
    rtx = f"best: SAM5 {e3p.RTX_IMAGENET} (implies {implied.low:.0f} to {implied.high:.0f} mJ)"
    tx2 = f"best on CIFAR-10: SAM5 {e3p.TX2_CIFAR}"
    small, most = (f"{span.value:.0f} mJ" for span in e3p.baseline_energies())
    return {
        find_model(e3p.TINY).name: (rtx, ""),
        find_model(e3p.LEVIT).name: ("", tx2),
        find_model(e3p.BASELINE).name: (f"least of its energies {small}", f"most of its energies {most}"),
    }


# ---------------------------------------------------------------- writing


def markdown(facts: dict[str, str], ranking: Ranking, agreed: Agreement | None, failures: Sequence[Failure]) -> str:
    lines = [f"# {facts['gpu']}: energy of E3P-ViT's models", ""]
    lines += [f"{facts['date']}, at commit {facts['commit']}. {facts['how']}", "", said(agreed), ""]
    lines += ["| SAM5 | model | top-1, % | energy, mJ per image | latency, ms | power, W | SAM5 | RTX 3050, in print | TX2, in print |"]
    lines += ["|" + "---|" * 9]
    public = in_public()
    for row in ranking.rows:
        name = row.model.partition(" @ ")[0]
        cells = [str(row.rank or "–"), name, "–" if row.top1_pct is None else f"{row.top1_pct:.2f}"]
        cells += [spread(row.energy_mj), spread(row.latency_ms), spread(row.power_w), spread(row.sam), *public.get(name, ("", ""))]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "The paper's tables by model are not public; both columns are its abstract's figures. Accuracy is the published top-1."]
    lines += [f"- {failure.variant}, {failure.stage}: {failure.reason}" for failure in failures]
    return "\n".join(lines) + "\n"


def said(agreed: Agreement | None) -> str:
    if agreed is None:
        return "Counter against integrated power: this board gives only one of them."
    far = agreed.furthest
    verdict = f"{'within' if agreed.within else 'NOT within'} {100 * COUNTER:.0f} %"
    return (
        f"Energy counter over integrated power: {spread(agreed.ratio, 4)} over {agreed.ratio.n} models, the furthest repeat "
        f"{far.ratio:.4f} ({far.model}, {far.counted_j:.1f} J counted, {far.integrated_j:.1f} J integrated): {verdict}."
    )


def spread(interval: Interval | None, digits: int = 3) -> str:
    if interval is None:
        return "–"
    bounds = "" if interval.low is None or interval.high is None else f" [{interval.low:.{digits}g}, {interval.high:.{digits}g}]"
    return f"{interval.value:.{digits}g}{bounds}"


def commit() -> str:
    """The commit that ran, ``+`` where the tree was changed; "unknown" outside a checkout."""
    try:
        asked = [["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "src", "benchmarks"]]
        said = [subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() for words in asked]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said[0] + ("+" if said[1] else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="E3P-ViT's models on an NVIDIA GPU: counter against power, and the ranking by SAM.")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--profile", default="quick(window_s=3.0)")
    parser.add_argument("--models", type=lambda text: text.split(","), default=[], help="instead of the study's 13")
    parser.add_argument("--backend", default=ON_GPU)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args(arguments)
    until = time.monotonic() + 60 * options.minutes
    if (lacking := missing(options.backend)) is not None:
        print(f"nothing measured: {lacking}")
        return 0
    plan = MeasurePlan(profile=options.profile, meter=METER, images="photos(n=8)")
    bench = Bench(notify=lambda event: print(f"{event.stage}: {event.text}", flush=True) if event.stage == "meter" else None)
    try:
        return measure_and_write(options, plan, bench, until)
    except EdgejouleError as error:
        print(f"gpu_energy: {error}", file=sys.stderr)
        return 1


def measure_and_write(options: argparse.Namespace, plan: MeasurePlan, bench: Bench, until: float) -> int:
    half = time.monotonic() + (until - time.monotonic()) / 2
    results = list(compiled(candidates(options.models), options.backend, plan, bench, half))
    artifacts = [result for result in results if isinstance(result, Artifact)]
    trials, failures = measured(artifacts, plan, bench, until)
    failures = [result for result in results if isinstance(result, Failure)] + failures
    found, pairs = summaries(trials, artifacts)
    date, agreed = time.strftime("%Y-%m-%d"), agreement(pairs)
    first = next(iter(trials.values()), [None])[0]
    device = first.environment.device if first is not None else None
    repeats = sum(map(len, trials.values()))
    facts = {
        "date": date,
        "commit": commit(),
        "gpu": (device.accelerator or device.name) if device is not None else "no GPU",
        "how": f"{len(found)} models, {repeats} repeats, {plan.profile}, batch 1, {options.backend}, meter {METER}, random weights.",
    }
    written = {
        **facts,
        "agreement": None if agreed is None else asdict(agreed),
        "pairs": [asdict(pair) | {"ratio": pair.ratio} for pair in pairs],
        "measurements": [encode(one) for one in found],
        "failures": [encode(failure) for failure in failures],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"gpu_energy_{date}.json").write_text(json.dumps(written, indent=1) + "\n")
    page = markdown(facts, ranked(found), agreed, failures)
    (options.out / f"gpu_energy_{date}.md").write_text(page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
