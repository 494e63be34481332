"""What shrinking costs and saves: per family and recipe the accuracy before, after and after recovery, MACs, bytes, latency and energy.

    python benchmarks/shrink.py [--data digits] [--seeds 3] [--train digits] [--networks ...] [--out FOLDER] [--json shrink.json] [--quick]

Every network is trained from random weights with several seeds (``edgejoule train``); each recipe is applied to each, once without and once
with recovery (the same recipe and ``distill(epochs=...)``, the teacher being the network itself as it was). Top-1 is of the test split, in
float32 in torch, which nothing is chosen by; bounds are over seeds (Student's t, 95 %). Latencies are of seed 0 at batch 1 through
onnxruntime and openvino, all variants of a family interleaved in one run, as the ratio to the unchanged network with an interval. Energy
is measured where this machine has a meter. A folder of images (``imagefolder(path="...")``, ``cifar10(path="...")``) may take the digits'
place, with networks and a training recipe that fit it.

The second table needs no training: plain ViTs at 224 px with random weights, heads and neurons pruned to half of the MACs, against the
target that batch-1 latency falls by 35 % or more.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgejoule import compiling, data, optimizing, stages, training
from edgejoule.bench import Bench, cores
from edgejoule.catalog import find_model
from edgejoule.errors import EdgejouleError
from edgejoule.measure.stats import ratio_interval, t_interval
from edgejoule.records import Artifact, Failure, Training, Variant
from edgejoule.sensitivity import interleaved
from edgejoule.store import NAME, Store
from edgejoule.study_file import CompilePlan, MeasurePlan, OptimizePlan, TrainPlan

NETWORKS = ("vit_digits", "edgevit_digits", "tiny_vit_digits", "levit_digits")
RECIPES = (
    "prune_heads(ratio=0.5)",
    "prune_ffn(ratio=0.5)",
    "prune_heads(ratio=0.5) | prune_ffn(ratio=0.5)",
    "prune_weights(ratio=0.5)",
    "prune_tokens(keep=0.7)",
    "prune_tokens(keep=0.7, criterion='predictor', epochs=8)",
    "merge_tokens(r=3)",
    "window_attention(size=2)",
    "qat(epochs=0)",
)
RECOVERY = "distill(epochs={epochs})"
LARGE = ("deit_tiny_patch16_224", "deit_small_patch16_224")
HALF = "prune_heads(ratio={heads}) | prune_ffn(ratio={neurons})"
HALVES = {"deit_tiny_patch16_224": (0.34, 0.65), "deit_small_patch16_224": (0.5, 0.5)}  # three heads lose one, six lose three
BACKENDS = ("onnxruntime", "openvino")
ROUNDS = 21


def main() -> None:
    """Runs, prints two tables, and writes all numbers as JSON where that is asked for."""
    asked = arguments()
    bench = Bench(cache=asked.out / "cache", notify=lambda event: None)
    began = time.monotonic()
    found: dict[str, Any] = {"about": about(asked), "rows": [], "half": []}
    for name in asked.networks if not asked.only_half else ():
        found["rows"] += family(name, asked, bench)
        print(f"{name}: done after {time.monotonic() - began:.0f} s", flush=True)
    for name in LARGE[: 1 if asked.quick else 2]:
        found["half"].append(halved(name, asked, bench))
    print(table(found["rows"]) + "\n\n" + half_table(found["half"]))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
        asked.json.with_suffix(".md").write_text(page(found))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--train", default="digits", help="the training recipe")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=8.0, help="of recovery")
    parser.add_argument("--out", type=Path, default=Path("runs/shrink"))
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--only-half", action="store_true", help="the second table alone")
    parser.add_argument("--quick", action="store_true", help="one network, one seed, one recipe: to see it work")
    asked = parser.parse_args()
    if asked.quick:
        asked.networks, asked.recipes, asked.seeds, asked.epochs, asked.train = ["vit_digits"], [RECIPES[1]], 1, 0.5, "digits(epochs=1)"
    return asked


# ---------------------------------------------------------------- trained networks


def family(name: str, asked: argparse.Namespace, bench: Bench) -> list[dict[str, Any]]:
    """One network with several seeds, through every recipe. A recipe that cannot work on it is a row with the reason."""
    spec = find_model(name if "(" in name else f'timm(name="{name}")')
    trained = train(spec, asked, bench)
    rows: list[dict[str, Any]] = []
    variants: dict[str, Variant] = {}
    for recipe in ("", *asked.recipes):
        row: dict[str, Any] = {"network": name, "recipe": recipe}
        try:
            finished = [through(one, recipe, asked, bench) for one in trained]
        except EdgejouleError as error:
            rows.append(row | {"failed": str(error)})
            continue
        row |= {key: spread([getattr(one, key) for one in finished]) for key in ("before", "after", "recovered")}
        first = finished[0]
        row |= {"macs": first.macs, "bytes": first.bytes, "seeds": len(trained), "tested": first.tested}
        variants[recipe] = first.variant
        rows.append(row)
    speeds = {backend: timed(variants, backend, bench) for backend in BACKENDS}
    energies = {recipe: energy(variant, bench) for recipe, variant in variants.items()}
    for row in rows:
        if row["recipe"] in variants:
            row |= {backend: speeds[backend].get(row["recipe"]) for backend in BACKENDS} | {"energy_j": energies[row["recipe"]]}
    return rows


def train(spec: Any, asked: argparse.Namespace, bench: Bench) -> list[Training]:
    """The network trained with every seed; finished runs are found again."""
    plan = TrainPlan(asked.data, (asked.train,), asked.seeds, "random")
    training.check(plan)
    with Store.open(asked.out / NAME) as store:
        number = store.begin_run("benchmarks/shrink.py", "", "", "")
        done = list(training.train_all(training.runs_of((spec,), plan, 0), asked.out, store, number, bench))
    for one in done:
        if isinstance(one, Failure):
            raise SystemExit(f"{one.variant} could not be trained: {one.reason}")
    return [one for one in done if isinstance(one, Training)]


class through:  # noqa: N801  # reads as what it is: one training, through a recipe
    """One trained network before a recipe, right after it, and after recovery; top-1 as fractions of the test images."""

    def __init__(self, one: Training, recipe: str, asked: argparse.Namespace, bench: Bench) -> None:
        plan = OptimizePlan(data=asked.data, train=asked.train)
        file = str(asked.out / one.weights)
        seeded = replace(bench, seed=one.seed)
        healed = f"{recipe} | {RECOVERY.format(epochs=asked.epochs)}" if recipe else recipe
        if recipe.startswith("qat"):  # it recovers while it quantises
            healed = recipe.replace("epochs=0", f"epochs={asked.epochs:g}")
        self.variant = optimizing.optimize(one.spec, file, healed, plan, seeded)
        assert one.accuracy is not None
        self.before, self.tested = one.accuracy.value, one.accuracy.n
        plain = optimizing.optimize(one.spec, file, recipe, plan, seeded)
        self.after = optimizing.top1_of(optimizing.network(plain, seeded), plain.spec, asked.data).value
        size = optimizing.shrunk(one.spec, file, self.variant, plan, seeded).after
        assert size.top1 is not None
        self.recovered, self.macs, self.bytes = size.top1.value, size.macs, size.bytes


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % interval over seeds, in percent."""
    found = t_interval([100 * value for value in values]) if len(values) > 1 else None
    return {
        "mean": 100 * statistics.fmean(values),
        "low": found.low if found else None,
        "high": found.high if found else None,
        "each": [round(100 * value, 2) for value in values],
    }


# ---------------------------------------------------------------- latency and energy


def timed(variants: dict[str, Variant], backend: str, bench: Bench) -> dict[str, dict[str, Any]]:
    """Median latency in seconds of each recipe's network, and its ratio to the unchanged one's, paired by round."""
    with ExitStack() as opened:
        sessions: dict[str, tuple[Any, Any]] = {}
        for recipe, variant in variants.items():
            kind = f'{backend}(precision="int8")' if "qat" in recipe else backend
            artifact = next(compiling.compile_variant(variant, (kind,), MeasurePlan(), bench, CompilePlan()))
            if isinstance(artifact, Failure):
                print(f"{artifact.variant} @ {artifact.backend}: {artifact.reason}", flush=True)
                continue
            session = stages.backend_of(artifact).load(artifact, cores(0))
            opened.callback(session.close)
            preprocessing = variant.spec.preprocessing
            sessions[recipe] = session, data.normalise(data.crops("photos(n=1)", preprocessing), preprocessing)
        rounds = list(interleaved(sessions, bench, ROUNDS))
    found = {}
    for recipe in sessions:
        mine, plain = [one[recipe] for one in rounds], [one[""] for one in rounds]
        ratio = ratio_interval(mine, plain) if recipe else None
        bounds = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high} if ratio is not None else {}
        found[recipe] = {"latency_s": statistics.median(mine), **bounds}
    return found


def energy(variant: Variant, bench: Bench) -> float | None:
    """Net joules an image through onnxruntime, where a meter is better than an estimate; else None."""
    from edgejoule.measure.meters import choose_meter
    from edgejoule.study import measure_one

    meter, _ = choose_meter("cpu")
    if meter.startswith(("estimate", "none")):
        return None
    kind = 'onnxruntime(precision="int8")' if "qat" in variant.recipe else "onnxruntime"
    plan = MeasurePlan(profile="quick", meter=meter)
    artifact = next(compiling.compile_variant(variant, (kind,), plan, bench, CompilePlan()))
    if not isinstance(artifact, Artifact):
        return None
    found, _ = measure_one(artifact, plan, None, bench)
    return found.net_energy_j.value if found.net_energy_j is not None else None


def halved(name: str, asked: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """A plain ViT with random weights, pruned to half of its MACs: what that does to its latency."""
    spec, (heads, neurons) = find_model(name), HALVES[name]
    recipe, plan = HALF.format(heads=heads, neurons=neurons), OptimizePlan()
    variants = {text: optimizing.optimize(spec, "random", text, plan, bench) for text in ("", recipe)}
    found = optimizing.shrunk(spec, "random", variants[recipe], plan, bench)
    speeds = {backend: timed(variants, backend, bench)[recipe] for backend in BACKENDS}
    return {"network": name, "recipe": recipe, "macs": [found.before.macs, found.after.macs], **speeds}


# ---------------------------------------------------------------- tables


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each network and recipe, Markdown."""
    lines = [
        "| network | recipe | top-1 before | after | recovered | MACs M | kB | " + " | ".join(f"{b} ms" for b in BACKENDS) + " | energy |"
    ]
    lines.append("|---" * (8 + len(BACKENDS)) + "|")
    lines += [" | ".join(("|", *cells(row), "|")).replace("| |", "|", 1).removesuffix("| |") + "|" for row in rows]
    return "\n".join(lines)


def cells(row: dict[str, Any]) -> Iterator[str]:
    """The cells of a row."""
    yield row["network"]
    yield quoted(row["recipe"]) if row["recipe"] else "as trained"
    if "failed" in row:
        yield from (row["failed"], *[""] * (5 + len(BACKENDS)))
        return
    for key in ("before", "after", "recovered"):
        one = row[key]
        yield f"{one['mean']:.2f}" + (f" [{max(one['low'], 0):.1f}, {min(one['high'], 100):.1f}]" if one["low"] is not None else "")
    yield f"{row['macs'] / 1e6:.2f}"
    yield f"{row['bytes'] / 1e3:.0f}"
    for backend in BACKENDS:
        yield latency(row.get(backend))
    yield "no meter" if row["energy_j"] is None else f"{1e3 * row['energy_j']:.2f} mJ"


def quoted(recipe: str) -> str:
    """A recipe in a cell of a Markdown table, where a bare bar would begin the next one."""
    return f"`{recipe}`".replace("|", "\\|")


def latency(one: dict[str, Any] | None) -> str:
    """``0.41, x 0.78 [0.75, 0.81]``."""
    if one is None:
        return "-"
    text = f"{1e3 * one['latency_s']:.3f}"
    return f"{text}, x {one['ratio']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" if "ratio" in one else text


def half_table(rows: Sequence[dict[str, Any]]) -> str:
    """The target: half of the MACs gone, and at least 35 % of the latency."""
    lines = ["| network | recipe | MACs M | MACs | " + " | ".join(BACKENDS) + " |", "|---" * (4 + len(BACKENDS)) + "|"]
    for row in rows:
        before, after = row["macs"]
        speeds = " | ".join(latency(row[backend]) for backend in BACKENDS)
        change = f"{100 * (after / before - 1):+.1f} %"
        lines.append(f"| {row['network']} | {quoted(row['recipe'])} | {before / 1e6:.0f} to {after / 1e6:.0f} | {change} | {speeds} |")
    return "\n".join(lines)


def about(asked: argparse.Namespace) -> dict[str, Any]:
    """Machine, date and commit."""
    from edgejoule.measure.environment import environment

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "device": environment(cores(0)).device.name,
        "threads": cores(0),
        "python": platform.python_version(),
        "data": asked.data,
        "train": asked.train,
        "recovery": RECOVERY.format(epochs=asked.epochs),
    }


def page(found: dict[str, Any]) -> str:
    """The tables with what they are of."""
    said = found["about"]
    where = f"{said['date']}, commit {said['commit']}, {said['device']}, {said['threads']} threads"
    how = f"{said['data']}, trained by `{said['train']}`, recovery `{said['recovery']}`"
    said_of = "Recipes that a network refuses are listed with the reason. Intervals of top-1 are over so few seeds wide: means say little."
    tables = f"{said_of}\n\n{table(found['rows'])}\n\n## Half of the MACs\n\n{half_table(found['half'])}"
    return f"# Shrinking\n\n`python benchmarks/shrink.py`: {where}; {how}.\n\n{tables}\n"


if __name__ == "__main__":
    main()
