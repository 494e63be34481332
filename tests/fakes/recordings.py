"""A few lines of every kind of trace file, and what a user must say of it: what its contract is judged by."""

from __future__ import annotations

from edgejoule.seams import TraceHints

SAID = TraceHints(voltage_v=3.3, interval_s=0.1)
FILES: dict[str, list[str]] = {
    "csv": ["time_s,power_w", *(f"{n / 10},{2 + n % 3}" for n in range(30))],
    "monsoon": [
        "Time (s),Main Avg Current (mA),Main Avg Power (mW),Main Avg Voltage (V),Main Max Current (mA)",
        *(f"{n / 5000:.4f},250.5,{925.0 + n},3.7,300.0" for n in range(30)),
    ],
    "joulescope": ["#time (s),current (A),voltage (V)", *(f"{n / 1000},0.{25 + n},5.0" for n in range(30))],
    "ppk2": ["Timestamp(ms),Current(uA)", *(f"{n / 100:.2f},{60000 + n}" for n in range(30))],
    "fnirsi": [
        "timestamp sample_in_packet voltage_V current_A dp_V dn_V temp_C_ema energy_Ws capacity_As",
        *(f"{1657568326.805 + 0.04 * (n // 4):.3f} {n % 4} 5.05 0.4 0.6 0.6 24.1 {n * 0.02:.3f} {n * 0.004:.3f}" for n in range(32)),
    ],
    "tegrastats": [
        f"07-14-2025 10:29:{30 + n // 10:02d} RAM 2147/7620MB (lfb 2x4MB) SWAP 1476/3810MB (cached 1MB) CPU [0%@729,4%@729] GR3D_FREQ 0% "
        f"cpu@47.687C tj@48.625C VDD_IN {4556 + n}mW/4556mW VDD_CPU_GPU_CV 483mW/483mW VDD_SOC 1451mW/1451mW"
        for n in range(30)
    ],
    "nvidia_smi": [
        "timestamp, utilization.gpu [%], power.draw [W]",
        *(f"2023/07/14 10:12:{40 + n // 10}.{n % 10}83, 0, {56.12 + n}" for n in range(30)),
    ],
    "powermetrics": [
        line
        for n in range(5)
        for line in (
            f"*** Sampled system activity (Fri Nov 10 12:37:0{n} 2023 +0100) (1000.00ms elapsed) ***",
            f"CPU Power: {940 + n} mW",
            "GPU Power: 300 mW",
            "ANE Power: 20 mW",
            f"Combined Power (CPU + GPU + ANE): {1260 + n} mW",
        )
    ],
    "perf": [f"     {n + 1}.000{n}00000      12.7{n} Joules power/energy-pkg/" for n in range(9)],
    "ptdaemon": [f"Time,01-10-2023 20:46:{n:02d}.787,Watts,23.8{n},Volts,247.92,Amps,0.198,PF,0.4855,Mark,a" for n in range(10)],
    "tasmota": [
        f'{{"Time":"2023-05-19T20:52:{n:02d}","ENERGY":{{"Total":514.153,"Power":{56 + n},"Voltage":234,"Current":0.392}}}}'
        for n in range(10, 20)
    ],
    "shelly": [f'{1700000000 + n} {{"output":true,"apower":{106.3 + n},"voltage":230.3,"aenergy":{{"total":267.813}}}}' for n in range(10)],
}
