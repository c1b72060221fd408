"""LoadGen in a process of its own, run as a script: it cannot be stopped but by ending its process.

Over a connection it is told what to test, sends (id, index) of the samples that are due, hears ids
of those that are answered, and sends None at its end. Imports nothing of this package.
"""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

QUERIES = 1024  # different ones that LoadGen draws from


def main(link: Connection) -> None:
    import mlperf_loadgen as loadgen

    wanted: dict[str, Any] = link.recv()
    settings, logs = loadgen.TestSettings(), loadgen.LogSettings()
    settings.scenario = getattr(loadgen.TestScenario, wanted["scenario"])
    settings.mode = loadgen.TestMode.PerformanceOnly
    for name, value in wanted["settings"].items():
        setattr(settings, name, value)
    logs.log_output.outdir = wanted["folder"]
    logs.enable_trace = False

    def issue(samples: list[Any]) -> None:
        link.send([(sample.id, sample.index) for sample in samples])

    def complete() -> None:
        try:
            while True:
                done = [loadgen.QuerySampleResponse(each, 0, 0) for each in link.recv()]
                loadgen.QuerySamplesComplete(done)
        except (EOFError, OSError):
            os._exit(1)  # who asked has gone

    threading.Thread(target=complete, daemon=True).start()
    system = loadgen.ConstructSUT(issue, lambda: None)
    library = loadgen.ConstructQSL(QUERIES, QUERIES, lambda samples: None, lambda samples: None)
    loadgen.StartTestWithLogSettings(system, library, settings, logs)
    link.send(None)
    os._exit(0)  # threads of C++ that are still there would abort an orderly end


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
