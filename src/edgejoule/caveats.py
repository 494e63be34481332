"""Every doubt that a result can carry, as one visible table: code -> severity, why it matters, what to do.

Only what was *seen* is said at the place that saw it. Standard library only: boards import this.
``reject`` means: the repeat is kept in the store and left out of the statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from edgejoule.records import Caveat, Severity

TABLE: dict[str, tuple[Severity, str, str]] = {
    # what was measured
    "quick_profile": (
        "note",
        "Short windows and three repeats give wide intervals and hide slow drift.",
        'Measure again with profile = "standard" before you decide anything.',
    ),
    "weights_random": (
        "note",
        "Latency and energy stand, because they do not depend on the values; a published accuracy is not this file's.",
        "Let the model hub be reached once, or fill its cache, and run again.",
    ),
    "accuracy_published": (
        "note",
        "The accuracy was measured by others on other software; this artifact's own was not.",
        "Evaluate the artifact on your own labelled images before you ship it.",
    ),
    "accuracy_mixed": (
        "warn",
        "Some accuracies were measured here and others were published, by other software on other splits: they differ by more than chance.",
        "Evaluate every artifact on the same labelled images (edgejoule evaluate) before you trust the order of close ones.",
    ),
    "accuracy_of_training": (
        "note",
        "The accuracy is the trained float32 network's own; what compiling lost is not in it.",
        "edgejoule evaluate measures the compiled file itself.",
    ),
    "weights_of_file": (
        "warn",
        "The accuracy is the published one; whether this file's network reaches it was not tried.",
        "Evaluate it on labelled images of yours: edgejoule evaluate.",
    ),
    "classes_assumed": (
        "note",
        "The artifact was made for a data set of another name, so that its classes stand in the same order is assumed.",
        "Compare the class names; ImageNet folders have the sorted WordNet ids (n01440764, ...), which is the order of published networks.",
    ),
    "logits_not_finite": (
        "warn",
        "Some logits were not finite; those images count as wrong, and are left out of the loss and of the calibration error.",
        "Compile with precision fp32, and look at the images that are named by their place.",
    ),
    "images_skipped": (
        "warn",
        "Some images could not be read and were left out, so the accuracy is that of the rest.",
        "Mend or remove the files.",
    ),
    "part_of_split": (
        "note",
        "Only some images of the split were used, so the interval is wide and the figure not the split's own.",
        "Leave --limit out.",
    ),
    "estimate": (
        "warn",
        "The energy is a model (CPU time times assumed watts), not a measurement; it can be off by 40 % or more.",
        "Run on a machine with a sensor (edgejoule doctor lists them), or attach a meter.",
    ),
    "replayed": (
        "warn",
        "The power was recorded at another time and is played back: it does not belong to this run.",
        "Use it to try the pipeline, never to compare models.",
    ),
    "no_meter": (
        "warn",
        "No energy sensor could be read, so there is no energy.",
        "edgejoule doctor says what is missing and how to get it.",
    ),
    # how it was measured
    "no_steady_state": (
        "warn",
        "The timings had not settled, so what was measured may be a transient.",
        "Close other programs, pin the clocks, raise the warm-up cap, or sustain for longer.",
    ),
    "idle_drift": (
        "warn",
        "Idle power before and after the window differ, so energy above idle is uncertain by that much.",
        "Let the machine cool down and close other programs.",
    ),
    "drift": (
        "reject",
        "The last third of the window is slower than the first: the machine slowed down (heat, clocks or another program).",
        "Cool the device, lower the power mode, or close other programs.",
    ),
    "drift_slight": ("warn", "The last third of the window is a little slower than the first.", "Cool the device or close other programs."),
    "throttled": ("reject", "The device reported thermal or power throttling during the window.", "Cool it, or lower its power mode."),
    "power_capped": ("note", "A software power cap was active during the window.", "State the cap with the result, or lift it."),
    "clock_drop": (
        "reject",
        "The clock in the last third of the window was below 95 % of the first third's.",
        "Cool the device and pin its clocks.",
    ),
    "repeats_vary": (
        "warn",
        "The repeats differ by more than 2.5 % (standard deviation over mean).",
        "More repeats, fewer other programs, pinned clocks.",
    ),
    "repeats_vary_much": (
        "warn",
        "The repeats differ by more than 10 % (standard deviation over mean): something else was running.",
        "Do not use this row; measure again on a quiet machine.",
    ),
    "few_repeats": ("note", "Too few repeats for an interval.", "Measure at least three repeats."),
    "sequential": (
        "note",
        "Repeats were added until the interval was narrow enough; the interval is widened for it (96.5 % nominal), and covers 94 to 96 %.",
        "Nothing to do; state it with the result.",
    ),
    "cap_reached": (
        "note",
        "The interval was still wider than asked for when the cap on repeats was reached.",
        "Raise the cap or quieten the machine.",
    ),
    "busy_machine": ("warn", "Other processes used the processor during the window.", "Close them and measure again."),
    "swap": ("reject", "Memory was swapped in or out during the window.", "Free memory or choose a smaller model."),
    "outliers": ("note", "Some inferences lie far outside the rest; they are counted, never deleted.", "Look at p99 beside the median."),
    "short_window": (
        "warn",
        "The window is short against the sensor's own update or averaging time.",
        'Use a longer window (profile = "standard").',
    ),
    "few_updates": (
        "warn",
        "The sensor updated fewer than 20 times in the window, so its energy is not measured.",
        "Use a longer window or a faster sensor.",
    ),
    "trace_gap": ("warn", "The sensor's samples have gaps of more than five periods.", "Close other programs, or poll less often."),
    "stuck_sensor": (
        "warn",
        "The sensor stood still while the load changed or ran, so its energy is not measured.",
        "Check the sensor; edgejoule doctor reads it once.",
    ),
    "negative_energy": ("warn", "The energy came out zero or negative, so it is not reported.", "Check the sensor and its rails."),
    "unpadded": (
        "warn",
        "There was too little idle around the window, so a sensor that averages biases the energy above idle.",
        "Leave idle of five averaging times on both sides, or use a longer window.",
    ),
    "clock_uncertain": (
        "warn",
        "The offset between the meter's clock and the device's is not known well enough for this window.",
        "Leave idle on both sides of the window, so that it does not matter, or align the clocks by a load step (measure.clocks).",
    ),
    "counter_differs": (
        "warn",
        "The energy counter and the integrated power differ by more than 5 %.",
        "Trust neither until you know why: a longer window, another meter.",
    ),
    "closure": (
        "warn",
        "Energy is not mean power times time within 1 %: a unit, a window or a stamp is wrong.",
        "Check the units and the stamps of the file.",
    ),
    "part_time": (
        "warn",
        "The sensor observes a part of the time only (25 of every 100 ms), so a load that varies is sampled, not integrated.",
        "Measure long windows, and no load that repeats in step with it.",
    ),
    "saturated": (
        "warn",
        "The sensor stood at the top of its range, so the true power was higher.",
        "Use a wider range or another shunt.",
    ),
    "power_off_pilot": (
        "warn",
        "The mean power differs by more than 5 % from the first repeat's: the device was in another state.",
        "Pin the clocks and the power mode, let the device cool, and measure again.",
    ),
    "sampler_costly": (
        "warn",
        "Sampling took more than 1 % of one core, and its own energy is in the figure.",
        "Read the sensor less often (period_s).",
    ),
    "clock_low": (
        "reject",
        "The clock was below 95 % of the one that was asked for.",
        "Cool the device, or ask for a clock that it can hold.",
    ),
    "canary_slow": (
        "reject",
        "A fixed small workload took more than 1.10 times as long after the window as before: the processor was throttled.",
        "Cool the device and pin its clocks.",
    ),
    "past_throttling": (
        "note",
        "The board has been throttled or under-voltage since it was booted, though not in this window.",
        "Use a better power supply, and reboot to clear the flag.",
    ),
    "charger": (
        "warn",
        "A charger or USB power is connected, so the battery's figures are not the device's consumption.",
        "Unplug it (adb over the network), or meter the supply.",
    ),
    "overlapping_windows": (
        "note",
        "Another window overlapped this one, and the sensor cannot tell them apart: each holds the energy of both.",
        "Measure one thing at a time, or nest the windows.",
    ),
    "deadlines_missed": (
        "note",
        "Some frames were not finished before the next one came.",
        "Use a faster artifact or a lower frame rate.",
    ),
    "steady_below_start": (
        "warn",
        "The sustained throughput is below the first minute's: short windows flatter this device.",
        "Report the steady state, and cool the device.",
    ),
    # what a trace file gave away
    "bad_lines": (
        "warn",
        "Some lines could not be read; they were left out, and the time they cover was interpolated.",
        "Look at the line that is named; cut the file around it.",
    ),
    "invalid_values": (
        "warn",
        "Some samples hold no valid value (negative, not a number, not available); they were left out.",
        "Look at the line that is named, and at the instrument's range.",
    ),
    "clock_backwards": (
        "warn",
        "Time goes backwards in the file; samples that do not come after the one before were left out.",
        "Split the file where the recording was restarted, or give --interval.",
    ),
    "stamps_rebuilt": (
        "note",
        "The stamps in the file are not the samples' own, so time was rebuilt from their number.",
        "Give --interval if you know the true one.",
    ),
    "stamps_coarse": (
        "warn",
        "Several samples share a stamp, so their times were spread evenly.",
        "Give --interval, or log with finer stamps.",
    ),
    "unit_inferred": (
        "note",
        "The file's own label of a unit is known to be wrong and was corrected.",
        "Check the duration against your watch.",
    ),
    "duplicate_rail": (
        "warn",
        "A rail appears twice in one sample; neither value was used.",
        "Check the logger.",
    ),
    "unknown_board": (
        "warn",
        "Nobody knows which of these rails add up to the whole, so there is no total.",
        "Name the rail that feeds the others, or measure at the input.",
    ),
    "coarse_sampling": (
        "warn",
        "The sampling is too coarse to tell single inferences apart (350 samples per second and 20 per inference are the least).",
        "Trust the sum only, or run a back-to-back loop and divide by the number of inferences.",
    ),
    "tails_overlap": (
        "warn",
        "The power does not return to the background between inferences, so they were cut apart at the lowest point.",
        "Trust the sum; leave more time between inferences for single values.",
    ),
    "threshold_sensitive": (
        "warn",
        "Half or twice the threshold changes the energy by more than 2 %.",
        "Leave more idle around the inferences, or run a back-to-back loop.",
    ),
    "on_battery": (
        "warn",
        "The machine runs on battery or the battery is charging, which changes its clocks and its power.",
        "Use mains power with a full battery.",
    ),
    # what was compiled
    "parity_low": (
        "reject",
        "The compiled file's logits differ from the network's by more than its precision explains, so it is not ranked.",
        "Do not ship it; compile for fp32 and compare.",
    ),
    "parity_blind": (
        "reject",
        "The network's outputs are nearly zero, so agreement with them proves nothing, and the artifact is not ranked.",
        "Give it real or live weights.",
    ),
    "precision_differs": (
        "reject",
        "The runtime executes another precision than was asked for, so the artifact is not ranked.",
        "Name the precision that it really runs.",
    ),
    "answers_differ": (
        "reject",
        "The compiled file names another class than the network on more images than its precision may cost, so it is not ranked.",
        "Allow fewer layers in int8 (a smaller --max-drop-pct), calibrate on images like yours, or use another precision.",
    ),
    "accuracy_lost": (
        "reject",
        "The compiled file recognises fewer of the labelled images than the float32 network, beyond the budget, so it is not ranked.",
        "Calibrate on images like yours, allow fewer layers in int8, use another precision, or raise max_drop_pct knowingly.",
    ),
    "fell_back": (
        "reject",
        "Operators run elsewhere than on the device or delegate that was asked for, so the figures are not that device's.",
        "Look at the operators that are named; rewrite the network without them, or measure the device that really runs it.",
    ),
    "budget_missed": (
        "warn",
        "Quantisation lost more than its budget on the held-out images, with as many layers put back to float as it may.",
        "Evaluate the file on labelled images (edgejoule evaluate), calibrate on images like yours, or use bf16 or fp16.",
    ),
    "not_run": (
        "reject",
        "The file was written here and never run, so nothing is known of what it computes, and it is not ranked.",
        "Take its folder to the device that runs it, and evaluate and measure it there.",
    ),
    "partly_delegated": (
        "note",
        "Some operators run outside the delegate, on the same device; every change between them costs a copy.",
        "Look at the operators that are named: a delegate that takes them all is faster.",
    ),
    # what was ranked
    "metric_replaced": (
        "warn",
        "The metric that the study asks for has no meaning for these rows, so they are ranked by efficiency instead.",
        "Name another metric in the study's [rank] table.",
    ),
    "baseline_missing": (
        "note",
        "The study's baseline is not among the measured models, so no energy saved is counted.",
        "See why it failed, or name another baseline.",
    ),
    "size_only": (
        "note",
        "Zeros in weights, and weights of 4 bits, save bytes of the file and no time: no backend here asks for kernels that use them.",
        "Compress the file to see it shrink; for time, prune structures (prune_heads, prune_ffn) or run in int8.",
    ),
    "slower_than_plain": (
        "warn",
        "The recipe costs time here instead of saving it: fewer multiply-adds do not promise a lower latency.",
        "Measure at the batch size that you need, or leave the pass out, unless accuracy is what it is there for.",
    ),
    "order_ambiguous": ("note", "The order changes with the unit of energy or the exponents of the metric.", "See rank --sensitivity."),
}


# Doubts about the artifact itself, not about a repeat: what carries one of them is shown and never ranked.
UNRANKED = frozenset({"parity_low", "parity_blind", "precision_differs", "answers_differ", "accuracy_lost", "fell_back", "not_run"})


def caveat(code: str, seen: str) -> Caveat:
    """The caveat of a code, with what was seen. Raises KeyError for a code that is not in the table."""
    severity, why, advice = TABLE[code]
    return Caveat(code=code, seen=seen, why=why, advice=advice, severity=severity)


@dataclass
class Doubts:
    """Collects doubts while a long input is read: per code the first evidence, and how often."""

    _first: dict[str, str] = field(default_factory=dict)
    _count: dict[str, int] = field(default_factory=dict)

    def add(self, code: str, seen: str, times: int = 1) -> None:
        """``seen`` is kept for the first of each code only. Raises KeyError for a code that is not in the table."""
        TABLE[code]
        self._first.setdefault(code, seen)
        self._count[code] = self._count.get(code, 0) + times

    def count(self, code: str) -> int:
        return self._count.get(code, 0)

    def caveats(self) -> tuple[Caveat, ...]:
        """One caveat per code, in the order of their first appearance."""
        more = {code: f" (and {n - 1} more)" if n > 1 else "" for code, n in self._count.items()}
        return tuple(caveat(code, seen + more[code]) for code, seen in self._first.items())
