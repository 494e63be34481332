"""Measuring one artifact on the machine this runs on. ``LEAVES`` lists the meters: a new one is a file and a line here."""

LEAVES = {
    "nvml": "edgejoule.measure.nvml:Nvml",
    "rapl": "edgejoule.measure.rapl:Rapl",
    "replay": "edgejoule.measure.replay:Replay",
    "estimate": "edgejoule.measure.estimate:Estimate",
}
