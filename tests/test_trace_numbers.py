"""Files whose joules were computed by hand: each once gave another number, or none where there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgejoule.errors import MeterError
from edgejoule.measure.recording import open_recording
from edgejoule.measure.traced import traced
from edgejoule.records import TraceEnergy
from edgejoule.seams import TraceHints


def energy(
    folder: Path, text: str, start: float | None = None, stop: float | None = None, segments: int | None = None, **hints: object
) -> TraceEnergy:
    path = folder / "trace.txt"
    path.write_text(text)
    return traced(open_recording(path, hints=TraceHints(**hints)), start, stop, segments).energy  # type: ignore[arg-type]


def codes(found: TraceEnergy) -> set[str]:
    return {doubt.code for doubt in found.caveats}


@pytest.mark.parametrize("header", ["t,p\n", ""])
def test_columns_by_number_are_not_found_among_the_values(header: str, tmp_path: Path) -> None:
    rows = "".join(f"{n},{n + 1}\n" for n in range(6))
    found = energy(tmp_path, header + rows, time_col="1", power_col="2", time_unit="s", power_unit="W")
    assert (found.total_energy_j, found.duration_s, found.samples) == (17.5, 5.0, 6)
    named = energy(tmp_path, "time_s,power_w\n" + rows, time_col="1", power_col="2")
    assert named.total_energy_j == 17.5


def pulses(starts: list[float], end_s: float, hz: float = 5000, length_s: float = 0.05, idle_w: float = 2.0, noise_w: float = 0.05) -> str:
    times = np.arange(round(end_s * hz)) / hz
    busy = np.zeros(len(times))
    for start in starts:
        busy += (times >= start - 1e-9) & (times < start + length_s - 1e-9)
    power = idle_w + 3.0 * busy + np.random.default_rng(1).normal(0, noise_w, len(times))
    return "time_s,power_w\n" + "".join(f"{t:.6f},{w:.6f}\n" for t, w in zip(times, power, strict=True))


def test_inferences_outside_the_window_are_no_idle(tmp_path: Path) -> None:
    text = pulses([0.5, 0.75, 1.0, 1.25, 1.5], 2.05)
    found = energy(tmp_path, text, 0.0, 1.15, 3)
    assert found.net_energy_j == pytest.approx(0.45, rel=0.01) and found.idle_w == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(("hz", "length_s"), [(5000, 0.005), (5000, 0.05), (500, 0.05), (1000, 0.05)])
def test_a_short_inference_is_not_drawn_out(hz: float, length_s: float, tmp_path: Path) -> None:
    found = energy(tmp_path, pulses([0.5, 0.75, 1.0], 1.5, hz, length_s), segments=3)
    for one, start in zip(found.segments, (0.5, 0.75, 1.0), strict=True):
        assert one.stop_s - one.start_s == pytest.approx(length_s, abs=0.1 / hz) and one.start_s == pytest.approx(start, abs=1 / hz)
        assert one.energy_j == pytest.approx(5.0 * length_s, rel=0.01 if length_s * hz > 25 else 0.02)  # 25 samples of noise


def test_noise_about_zero_is_not_rectified(tmp_path: Path) -> None:
    found = energy(tmp_path, pulses([0.5, 0.75, 1.0], 1.5, idle_w=0.0), segments=3)
    assert found.total_energy_j == pytest.approx(0.45, rel=0.01) and "invalid_values" not in codes(found)
    sentinel = energy(tmp_path, "time_s,power_w\n" + "".join(f"{n},{-1 if n == 5 else 20}\n" for n in range(11)))
    assert sentinel.total_energy_j == 200.0 and "invalid_values" in codes(sentinel)


def smi(*rows: str) -> str:
    return "timestamp, name, power.draw [W]\n" + "".join(f"2023/07/14 10:12:{row}\n" for row in rows)


def test_two_gpus_that_no_column_tells_apart_are_refused(tmp_path: Path) -> None:
    rows = [row for n in range(15) for row in (f"{40 + n}.483, NVIDIA A100, 50.00 W", f"{40 + n}.486, NVIDIA A100, 70.00 W")]
    with pytest.raises(MeterError, match="no column tells GPUs apart"):
        energy(tmp_path, smi(*rows))
    one = smi(*(f"{40 + n}.483, NVIDIA A100, 50.00 W" for n in range(15)))
    assert energy(tmp_path, one).total_energy_j == pytest.approx(700.0)
    held = smi(*["46.000, NVIDIA A100, 50.00 W"] * 21)
    assert energy(tmp_path, held, interval_s=0.1).total_energy_j == pytest.approx(100.0), "--interval wins over any stamps"


def test_what_is_not_covered_is_neither_divided_by_nor_passed_over(tmp_path: Path) -> None:
    lines = "".join(f"Time,01-10-2023 20:46:{n:02d}.787,Watts,{-1 if n < 4 else 20}.000000,Volts,247.920000\n" for n in range(40))
    late = energy(tmp_path, lines)
    assert (
        late.total_energy_j == pytest.approx(700.0) and late.duration_s == pytest.approx(35.0) and late.power_w["wall"] == pytest.approx(20)
    )


def apple(n: int, combined: bool = True) -> str:
    head = f"*** Sampled system activity (Fri Nov 10 12:37:{n:02d} 2023 +0100) (1000.00ms elapsed) ***\n"
    parts = "CPU Power: 1700 mW\nGPU Power: 250 mW\nANE Power: 50 mW\n"
    return head + parts + ("Combined Power (CPU + GPU + ANE): 2000 mW\n" if combined else "")


def test_a_total_that_ends_before_the_trace_is_told(tmp_path: Path) -> None:
    found = energy(tmp_path, "".join(apple(n, combined=n < 9) for n in range(10)))
    assert found.power_w["combined"] == pytest.approx(2.0)
    whole = energy(tmp_path, "".join(apple(n) for n in range(10)))
    assert whole.total_energy_j == pytest.approx(20.0)
    slow = energy(tmp_path, "".join(apple(n) for n in range(10)), interval_s=2.0)
    assert (slow.total_energy_j, slow.duration_s) == (pytest.approx(40.0), 20.0), "--interval wins: the same watts for twice as long"
