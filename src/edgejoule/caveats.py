"""Every doubt that a result can carry, as one visible table: code -> severity, why it matters, what to do.

Only what was *seen* is said at the place that saw it. Standard library only: boards import this.
``reject`` means: the repeat is kept in the store and left out of the statistics.
"""

from __future__ import annotations

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
        "Latency and energy stand, because they do not depend on the values; accuracy is the published figure, not this file's.",
        "Let the model hub be reached once, or fill its cache, and run again.",
    ),
    "accuracy_published": (
        "note",
        "The accuracy was measured by others on other software; this artifact's own was not.",
        "Evaluate the artifact on your own labelled images before you ship it.",
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
        "The timings had not settled when the warm-up cap was reached, so the window may hold a transient.",
        "Close other programs, pin the clocks, or raise the warm-up cap.",
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
        "Repeats were added until the interval was narrow enough, which makes a 95 % interval cover 92 to 95 %.",
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
    "on_battery": (
        "warn",
        "The machine runs on battery or the battery is charging, which changes its clocks and its power.",
        "Use mains power with a full battery.",
    ),
    # what was compiled
    "parity_low": (
        "warn",
        "The compiled file's logits differ from the network's by more than its precision explains.",
        "Do not ship it; compile for fp32 and compare.",
    ),
    "parity_blind": (
        "warn",
        "The network's outputs are nearly zero, so agreement with them proves nothing.",
        "Give it real or live weights.",
    ),
    "precision_differs": (
        "reject",
        "The runtime executes another precision than was asked for.",
        "Name the precision that it really runs.",
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
    "order_ambiguous": ("note", "The order changes with the unit of energy or the exponents of the metric.", "See rank --sensitivity."),
}


def caveat(code: str, seen: str) -> Caveat:
    """The caveat of a code, with what was seen. Raises KeyError for a code that is not in the table."""
    severity, why, advice = TABLE[code]
    return Caveat(code=code, seen=seen, why=why, advice=advice, severity=severity)
