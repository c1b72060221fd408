"""What the operating system says of this process."""

from __future__ import annotations


def resident_megabytes() -> float:
    """Memory of this process that is in RAM, in units of 10**6 bytes; 0 where /proc is missing."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return 0.0
