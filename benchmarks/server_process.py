"""A server of its own process, for benchmarks that need one: started, asked, stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any, Self

GAUGES = ("nuwa_slots_used", "nuwa_requests_waiting", "nuwa_calls_open")


class ServerProcess:
    """`nuwa serve BUNDLE` with these settings, on free ports. Its log is in a temporary file."""

    def __init__(self, bundle: Path | str, port: int = 0, **settings: Any) -> None:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        self._log = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115  as long as the server runs
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "nuwa.runtime",
                "serve",
                str(bundle),
                f"--port={port}",
                "--metrics-port=0",
                *flags,
            ],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self.process.stdout is not None, "it is piped"
        line = self.process.stdout.readline()
        if not line.startswith("nuwa: ready on "):
            self.process.wait(20)
            self._log.seek(0)
            raise RuntimeError(f"the server did not start: {line}{self._log.read()}")
        self.address = line.split()[3].rstrip(":")
        self.metrics_address = line.split("metrics on ")[1].split(",")[0].strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60.0) -> int:
        """Its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout)

    def log_text(self) -> str:
        """What it has logged until now."""
        return Path(self._log.name).read_text()

    def metrics_text(self) -> str:
        """As Prometheus reads them."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=10) as page:
            return page.read().decode()

    def metrics(self) -> dict[str, float]:
        """Sums by name, over all labels."""
        found: dict[str, float] = {}
        for line in self.metrics_text().splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def gauges(self) -> dict[str, float]:
        """What has to be nothing when nobody asks for anything."""
        metrics = self.metrics()
        return {name: metrics[name] for name in GAUGES}

    @property
    def resident_megabytes(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024 / 1e6
