"""Trace files of instruments and loggers, one file a format. ``LEAVES`` lists them: a new one is a file and a line here.

Each leaf turns lines into blocks of samples (``seams.TraceFormat``) and knows neither windows nor energy. What they share (numbers,
stamps, units, the table of columns) is in ``reading.py``; ``measure/recording.py`` opens files, chooses the format and bounds memory.
"""

LEAVES = {
    "csv": "edgejoule.measure.traces.table:Csv",
    "monsoon": "edgejoule.measure.traces.monsoon:Monsoon",
    "joulescope": "edgejoule.measure.traces.joulescope:Joulescope",
    "ppk2": "edgejoule.measure.traces.ppk2:Ppk2",
    "fnirsi": "edgejoule.measure.traces.fnirsi:Fnirsi",
    "tegrastats": "edgejoule.measure.traces.tegrastats:Tegrastats",
    "nvidia_smi": "edgejoule.measure.traces.nvidia_smi:NvidiaSmi",
    "powermetrics": "edgejoule.measure.traces.powermetrics:Powermetrics",
    "perf": "edgejoule.measure.traces.perf:Perf",
    "ptdaemon": "edgejoule.measure.traces.ptdaemon:PtDaemon",
    "tasmota": "edgejoule.measure.traces.plugs:Tasmota",
    "shelly": "edgejoule.measure.traces.plugs:Shelly",
}
