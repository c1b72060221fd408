"""The models that a server has: several bundles side by side, each in one version or more.

A model that is loaded anew gets the next version; who asks for none in particular gets the latest.
The old one goes when the last request in it has ended, and only once the new one can take its
place: a bundle that cannot be loaded changes nothing. Knows neither gRPC nor what a request is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .engine_protocol import Engine
from .errors import FieldError, NotFoundError, NotReadyError, ShuttingDownError
from .scheduler import Scheduler

log = logging.getLogger("nuwa.runtime")

CLOSE_SECONDS = 100.0  # for the engines of all models to return
SEPARATOR = "/"  # between a model's name and its version


@dataclass(eq=False)
class Loaded:
    """One version of a model. path: its bundle, None where an engine was given; users: calls that
    are in it now.
    """

    name: str
    version: int
    engine: Engine
    scheduler: Scheduler
    path: Path | None = None
    users: int = 0
    retired: bool = False
    idle: threading.Event = field(default_factory=threading.Event)

    @property
    def title(self) -> str:
        return f"{self.name}{SEPARATOR}{self.version}"


class Host:
    """open_engine(path): loads a bundle; schedule(engine, name): a scheduler for it, not started;
    on_change(): called when a model has come or gone, and when one that went has ended.

    Safe to use from any thread; of loading, one thing happens at a time.
    """

    def __init__(
        self,
        open_engine: Callable[[Path], Engine],
        schedule: Callable[[Engine, str], Scheduler],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._open_engine, self._schedule, self._on_change = open_engine, schedule, on_change
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._models: dict[str, dict[int, Loaded]] = {}  # in the order they came; by version
        self._last_version: dict[str, int] = {}
        self._retired: list[Loaded] = []  # whose last calls have not ended
        self._paths: dict[str, Path] = {}  # of all that ever were, by name
        self._expected: set[str] = set()
        self._default: str | None = None  # the name of the first one, also while it is away
        self._closing = False

    def expect(self, names: Iterable[str]) -> None:
        """Models that will be loaded next; until they are, who asks for them is told to wait."""
        with self._lock:
            self._expected |= set(names)

    def expects(self, name: str) -> bool:
        """Whether a model of this name will be loaded next."""
        with self._lock:
            return name in self._expected

    @property
    def loading(self) -> bool:
        """Whether a bundle is being loaded now."""
        return self._loading.locked()

    @property
    def complete(self) -> bool:
        """Whether there is a model, and none that is still expected."""
        with self._lock:
            return bool(self._models) and not self._expected

    @property
    def loaded(self) -> list[Loaded]:
        """All that take requests: the default model first, of each the latest version first."""
        with self._lock:
            names = sorted(self._models, key=lambda name: name != self._default)
            return [
                self._models[name][number]
                for name in names
                for number in sorted(self._models[name], reverse=True)
            ]

    @property
    def running(self) -> list[Loaded]:
        """All that may be at work: those loaded, and those whose last calls have not ended."""
        with self._lock:
            retired = list(self._retired)
        return [*self.loaded, *retired]

    def find(self, model: str = "") -> Loaded:
        """The one that is meant by "NAME", "NAME/VERSION" or "", which is the first one that came.

        NotFoundError names those there are; NotReadyError while there is none at all, or this one
        is still expected, or it is the first one and was taken away.
        """
        with self._lock:
            return self._find(model)

    @contextmanager
    def use(self, model: str = "") -> Iterator[Loaded]:
        """As find, for a call: what is found stays until the call is over."""
        with self._lock:
            found = self._find(model)
            found.users += 1
        try:
            yield found
        finally:
            with self._lock:
                found.users -= 1
                if found.retired and not found.users:
                    found.idle.set()

    def add(self, engine: Engine, name: str = "", path: Path | None = None) -> Loaded:
        """Serves an engine, as the next version of the model of this name."""
        name = name or engine.info.name
        scheduler = self._schedule(engine, name)
        with self._lock:
            if self._closing:
                raise ShuttingDownError("the server is shutting down")
            version = self._last_version.get(name, 0) + 1
            self._last_version[name] = version
            added = Loaded(name, version, engine, scheduler, path)
            scheduler.start()
            self._models.setdefault(name, {})[version] = added
            self._default = self._default or name
            self._expected.discard(name)
            if path is not None:
                self._paths[name] = path
        info = engine.info
        log.info("%s: %s on %s (%s)", added.title, path or info.name, info.backend, info.runs_on)
        return added

    def load(self, name: str, path: Path, *, beside: bool = False) -> Loaded:
        """Loads a bundle as the next version of a model, in place of the others or beside them.

        What `open_engine` raises comes through, and all stays as it was.
        """
        with self._loading:
            added = self.add(self._open_engine(path), name, path)
            if not beside:
                earlier = self._versions(added.name)
                self._retire([each for each in earlier if each.version < added.version])
        self._on_change()
        return added

    def reload(self, name: str, *, beside: bool = False) -> Loaded:
        """As load, a model's bundle again, which may be another one by now; also one taken away.

        NotFoundError and NotReadyError as find; FieldError if the model has no bundle.
        """
        with self._lock:
            path = self._paths.get(name)
        if path is None:
            found = self.find(name)
            name, path = found.name, found.path
        if path is None:
            raise FieldError("model", f"model {name!r} was not loaded from a bundle")
        return self.load(name, path, beside=beside)

    def unload(self, model: str) -> list[Loaded]:
        """Takes a version of a model away, or all of them. NotFoundError if it is not there."""
        with self._loading:
            found = self.find(model)
            gone = [found] if SEPARATOR in model else self._versions(found.name)
            self._retire(gone)
        self._on_change()
        return gone

    def close(self) -> None:
        """Ends everything that is loaded; nothing can be loaded any more."""
        with self._lock:
            self._closing = True
            left = [each for versions in self._models.values() for each in versions.values()]
            left += self._retired
            self._models = {}
        threads = [threading.Thread(target=each.scheduler.close, daemon=True) for each in left]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(CLOSE_SECONDS)

    def _find(self, model: str) -> Loaded:
        """Under the lock."""
        if not self._models:
            raise NotReadyError("no model is loaded")
        name, separator, version = model.partition(SEPARATOR)
        versions = self._models.get(name or self._default or "")
        if versions is None and name in self._expected:
            raise NotReadyError(f"model {name!r} is being loaded")
        if versions is None and not model:
            raise NotReadyError(
                f"model {self._default!r}, the default one, is not loaded now; this server has "
                f"{', '.join(self._models)}"
            )
        if versions is None or (separator and not name):
            raise NotFoundError(
                f"there is no model {model!r}; this server has {', '.join(self._models)}"
            )
        if not separator:
            return versions[max(versions)]
        found = {str(number): each for number, each in versions.items()}.get(version)
        if found is None:
            raise NotFoundError(
                f"model {name!r} has no version {version!r}; it has "
                f"{', '.join(map(str, sorted(versions)))}"
            )
        return found

    def _versions(self, name: str) -> list[Loaded]:
        with self._lock:
            return list(self._models.get(name, {}).values())

    def _retire(self, gone: list[Loaded]) -> None:
        """Takes these out of what can be found; their schedulers end with their last calls."""
        with self._lock:
            for each in gone:
                versions = self._models.get(each.name, {})
                if versions.pop(each.version, None) is None:
                    continue
                if not versions:
                    del self._models[each.name]
                each.retired = True
                if not each.users:
                    each.idle.set()
                self._retired.append(each)
                threading.Thread(
                    target=self._end, args=(each,), name="nuwa-retire", daemon=True
                ).start()

    def _end(self, gone: Loaded) -> None:
        gone.idle.wait()
        gone.scheduler.close()
        with self._lock:
            self._retired.remove(gone)
        log.info("%s is gone", gone.title)
        self._on_change()
