"""The result of `nuwa bench`: its schema, its file, and how its values look to people.

docs/bench-result.md says what each field is. Knows nothing of how a value was measured.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from nuwa.spec.files import write_text

SCHEMA = "nuwa-bench/1"
REQUIRED = ("when", "command", "model", "workload", "scenario", "metrics")
BULKY = ("timeline", "latencies", "rounds", "each_launch")
KINDS: dict[str, type] = {
    "when": str,
    "command": str,
    "notes": list,
    "interrupted": bool,
    "turns": dict,
    "machine": dict,
    "model": dict,
    "workload": dict,
    "scenario": dict,
    "card": dict,
    "warm_up": dict,
    "outcomes": dict,
    "metrics": dict,
    "phases": dict,
    "steps": list,
    "load": list,
    "timeline": dict,
    "latencies": dict,
    "search": dict,
    "server": dict,
    "conditions": dict,
    "loadgen": dict,
    "memory": dict,
    "power": dict,
    "rounds": dict,
    "each_launch": list,
}
NAMES: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
SCALED = {"B", "B/s", "FLOP", "FLOP/s", "FLOP/B"}  # written with k, M, G: powers of 1000
PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes the JSON, a number that is not finite as null; OSError."""
    parts = ((name, _finite(part)) for name, part in result.items())
    lines = [
        f"  {json.dumps(name)}: "
        + json.dumps(part, indent=None if name in BULKY else 2).replace("\n", "\n  ")
        for name, part in parts
    ]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def read(path: Path) -> dict[str, Any]:
    """A result that has all of REQUIRED; ValueError that names what is wrong; OSError."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(result, dict):
        raise ValueError(f"{path} is not a result of `nuwa bench`: it is not an object")
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path} has the schema {result.get('schema')!r}; it must be {SCHEMA!r}")
    missing = [name for name in REQUIRED if result.get(name) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    for name, kind in KINDS.items():
        if result.get(name) is not None and not isinstance(result[name], kind):
            found = type(result[name]).__name__
            raise ValueError(f"{path}: {name!r} must be {NAMES[kind]}, not {found}")
    return result


def last_line(result: dict[str, Any]) -> str:
    """The JSON in one line, without the parts of BULKY; a number that is not finite as null."""
    short = {name: _finite(part) for name, part in result.items() if name not in BULKY}
    return json.dumps(short, separators=(",", ":"))


def quantity(value: float | None, unit: str = "") -> str:
    """Three significant digits and the unit: "33.0 ms", "1.25 GB/s", "4.90 /s"; "–" for None.

    Seconds are milliseconds below one.
    """
    if value is None:
        return "–"
    if unit == "s":
        whole = abs(value) >= 0.9995
        return f"{significant(value)} s" if whole else f"{significant(1000 * value)} ms"
    if unit in SCALED:
        return scaled(value, unit)
    return f"{significant(value)} {unit.removeprefix('1')}".rstrip()


def significant(value: float, digits: int = 3) -> str:
    """33.0, 4.90, 12 345: that many digits, or more where the whole part has more."""
    rounded = float(f"{value:.{digits - 1}e}")
    if not rounded:
        return "0"
    power = math.floor(math.log10(abs(rounded)))
    if power < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - power)}f}".replace(",", " ")


def scaled(value: float, unit: str) -> str:
    """1.25 GB: three digits and a prefix, in powers of 1000."""
    power = 0
    while abs(float(f"{value:.2e}")) >= 1000 and power < len(PREFIXES) - 1:
        value, power = value / 1000, power + 1
    text = f"{value:.0f}" if unit == "B" and power == 0 else significant(value)
    return f"{text} {PREFIXES[power]}{unit}"


def count(value: float | None) -> str:
    """12 345; "–" for None."""
    return "–" if value is None else f"{value:,.0f}".replace(",", " ")


def several(number: float, word: str) -> str:
    """1 row, 2 rows."""
    return f"{count(number)} {word}{'' if number == 1 else 's'}"


def share(value: float | None) -> str:
    """60.0 %; "–" for None."""
    return "–" if value is None else f"{100 * value:.1f} %"


def percentile(key: str) -> str:
    """The name of a quantile: "0.999" is p99.9."""
    return f"p{100 * float(key):.6g}"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")
