"""Measuring one artifact on the machine this runs on. ``LEAVES`` lists the meters: a new one is a file and a line here."""

LEAVES = {
    "nvml": "edgejoule.measure.nvml:Nvml",
    "rapl": "edgejoule.measure.rapl:Rapl",
    "ina3221": "edgejoule.measure.ina3221:Ina3221",
    "tegrastats": "edgejoule.measure.tegrastats:Tegrastats",
    "hwmon": "edgejoule.measure.hwmon:Hwmon",
    "odpm": "edgejoule.measure.odpm:Odpm",
    "perf": "edgejoule.measure.perf:Perf",
    "powermetrics": "edgejoule.measure.powermetrics:Powermetrics",
    "battery": "edgejoule.measure.battery:Battery",
    "replay": "edgejoule.measure.replay:Replay",
    "estimate": "edgejoule.measure.estimate:Estimate",
}
