"""What is measured: an engine in this process, or a server somewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..bundle import manifest_hash
from ..client import PLAIN, Access, BaseClient, Client, LocalClient
from ..core import ModelInfo
from ..host import SEPARATOR


@dataclass(frozen=True)
class Target:
    """title: for reports; bundle: its folder, where that is known; slots: None where it is not
    known; model: what requests name, "" where there is one only; steps: rows and seconds of each
    decode step, filled while an engine is in this process.
    """

    client: BaseClient
    info: ModelInfo
    title: str
    bundle: Path | None
    slots: int | None
    threads: int | None
    model: str = ""
    steps: list[tuple[int, float]] = field(default_factory=list)

    @property
    def local(self) -> bool:
        return self.title == IN_PROCESS


IN_PROCESS = "in process"


@contextmanager
def in_process(
    bundle: Path, *, slots: int, threads: int | None, backend: str, queue_size: int
) -> Iterator[Target]:
    """An engine of its own, with the queue and the scheduler of a server, and no network."""
    from ..engine import load_engine

    engine = load_engine(bundle, slots=slots, threads=threads, backend=backend)
    steps: list[tuple[int, float]] = []
    engine.on_step = lambda rows, seconds: steps.append((rows, seconds))
    with LocalClient(engine, queue_size=queue_size) as client:
        yield Target(client, engine.info, IN_PROCESS, bundle, slots, threads, steps=steps)


@contextmanager
def over_grpc(
    address: str, *, model: str = "", access: Access = PLAIN, bundle: Path | None = None
) -> Iterator[Target]:
    """A server that runs; nothing is tried again. bundle: its folder, for what the card needs.

    ValueError if the server has another bundle than that of the folder.
    """
    with Client(address, attempts=1, access=access) as client:
        info = client.get_model(model)
        if bundle is not None and manifest_hash(bundle) != info.bundle_hash:
            raise ValueError(
                f"{bundle} is not the bundle of {info.name} at {address}: its hash begins with "
                f"{manifest_hash(bundle)[:12]}, the server's with {info.bundle_hash[:12]}"
            )
        version = f"{info.name}{SEPARATOR}{info.version}"  # whatever is loaded meanwhile
        slots = client.slot_count(version) or None
        yield Target(client, info, f"gRPC {address}", bundle, slots, None, version)
