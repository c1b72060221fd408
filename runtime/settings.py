"""Settings of `nuwa serve`: one schema for flags, environment (NUWA_...) and a TOML file.

Flags go before the environment, that before the file, and that before the defaults.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .backends.base import AUTO, BACKENDS

ENVIRONMENT = "NUWA_"
MODEL_NAME = re.compile(r"[\w.-]+", re.ASCII)
LOCAL = "127.0.0.1"
LOOPBACK = ("localhost", LOCAL, "::1")
OTHER_VARIABLES = ("NUWA_TOKEN",)  # of the environment, that other commands read
INT32 = 2**31 - 1  # the largest option that gRPC takes, in which it counts bytes and milliseconds
DAY = 86400.0
YEAR = 365 * DAY
LONGEST_AGE = 24 * DAY  # in milliseconds just below INT32

# What Kubernetes puts into the environment of pods beside a Service nuwa, or nuwa-metrics.
_OF_SERVICE = re.compile(
    r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)",
    re.ASCII,
)
_LINK = re.compile("(tcp|udp|sctp)://")  # NUWA_PORT=tcp://10.0.0.7:50051


def _backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"choose one of {', '.join(BACKENDS)}")
    return name


def _bundles(value: Any) -> Any:
    """From "NAME=FOLDER,NAME=FOLDER" too, as flags and the environment have it."""
    if isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",") if part]
        if not all(name.strip() and equals and folder.strip() for name, equals, folder in pairs):
            raise ValueError("is not NAME=FOLDER,NAME=FOLDER")
        names = [name.strip() for name, _, _ in pairs]
        for n, name in enumerate(names):
            if name in names[:n]:
                raise ValueError(f"name {name!r} is there twice")
        value = {name: folder.strip() for name, (_, _, folder) in zip(names, pairs, strict=True)}
    if isinstance(value, dict):
        for name in value:
            if not MODEL_NAME.fullmatch(str(name)):
                raise ValueError(f"name {name!r} is not of letters, digits, '_', '.' and '-'")
    return value


def _endpoint(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # as of a port that is no number
        good = False
    if not good or re.search(r"\s", url):
        raise ValueError("is not http://HOST:PORT, nor https:// for TLS")
    return url


class ServerSettings(BaseModel):
    """What a server is started with. Durations are in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    bundle: Path | None = Field(None, description="folder made by `nuwa export`")
    bundles: Annotated[dict[str, Path], BeforeValidator(_bundles)] = Field(
        {}, description="further ones by the names of their models: NAME=FOLDER,NAME=FOLDER"
    )
    host: str = Field(LOCAL, description="interface to listen on")
    port: int = Field(50051, ge=0, le=65535, description="0 takes a free one")
    backend: Annotated[str, AfterValidator(_backend)] = Field(
        AUTO, description="what decodes; auto: the fastest for this machine's processor"
    )
    threads: int | None = Field(None, ge=1, le=4096, description="CPU threads; unset: one a core")
    slots: int = Field(
        1, ge=1, le=65536, description="samples that are decoded at a time; others wait"
    )
    queue_size: int = Field(
        64, ge=1, le=10**6, description="requests that may wait; more are refused"
    )
    max_watches: int = Field(
        256, ge=1, le=65536, description="health watches that may be open; more are refused"
    )
    max_streams: int = Field(
        128,
        ge=1,
        le=65536,
        description="streams of the Open Inference Protocol that may be open; more are refused",
    )
    max_message_bytes: int = Field(16 * 2**20, ge=1024, le=INT32, description="of one request")
    max_media_bytes: int = Field(
        8 * 2**20, ge=1, le=INT32, description="of one picture or clip as sent"
    )
    max_media_pixels: int = Field(2**24, ge=1, le=INT32, description="of one picture or clip")
    max_media_frames: int = Field(256, ge=1, le=INT32, description="of one clip that is given")
    max_unread_bytes: int = Field(
        64 * 2**20,
        ge=2**20,
        le=2**40,
        description="pixels of one request that its client has not read yet, before the request "
        "is ended",
    )
    grace: float = Field(
        30.0, ge=0, le=YEAR, description="how long running requests may go on at the end"
    )
    lame_duck: float = Field(
        0.0,
        ge=0,
        le=YEAR,
        description="how long requests are still taken after health says NOT_SERVING",
    )
    hang_timeout: float = Field(
        30.0, gt=0, le=YEAR, description="in one call of the engine, before health says NOT_SERVING"
    )
    slow_sender_timeout: float = Field(
        30.0,
        gt=0,
        le=YEAR,
        description="in which the request of a call has to come, or it is cancelled",
    )
    slow_reader_timeout: float = Field(
        60.0,
        gt=0,
        le=YEAR,
        description="in which a client takes no event, before its call is cancelled",
    )
    max_connection_age: float | None = Field(
        None,
        ge=0.001,
        le=LONGEST_AGE,
        description="after which clients are to connect anew; their calls at hand have 600 s more; "
        "unset: never",
    )
    tls_certificate: Path | None = Field(None, description="chain of the server, PEM")
    tls_key: Path | None = Field(None, description="its private key, PEM")
    tls_client_ca: Path | None = Field(
        None, description="who signs certificates that clients must show, PEM; unset: none must"
    )
    insecure: bool = Field(False, description="listen without TLS beyond this machine")
    tokens: Path | None = Field(
        None, description="TOML file of the tokens that clients must send; unset: none must"
    )
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="of metrics over HTTP, for Prometheus; unset: none"
    )
    metrics_host: str = Field(
        LOCAL, description="interface of the metrics, for which there is neither TLS nor tokens"
    )
    trace_endpoint: Annotated[str, AfterValidator(_endpoint)] | None = Field(
        None, description="OpenTelemetry collector that takes OTLP over gRPC, http://HOST:4317"
    )
    reflection: bool = Field(True, description="tell clients of the methods there are")
    log_format: Literal["text", "json"] = Field("text", description="of the log on stderr")

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None, "it is of a field"
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("true and false are for settings that are on or off")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ServerSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        # The default is harmless, and in every file that `to_toml` has written.
        if self.metrics_port is None and self.metrics_host != LOCAL:
            raise ValueError(
                f"metrics_host {self.metrics_host!r} needs metrics_port, without which there are "
                "no metrics over HTTP"
            )
        plain = self.tls_certificate is None and not self.insecure
        if plain and self.host not in LOOPBACK:
            raise ValueError(
                f"host {self.host!r} is reached from other machines, so it needs tls_certificate "
                "and tls_key; or say insecure, where the network is trusted"
            )
        return self

    def to_toml(self) -> str:
        """As a file that `read` reads, with what each setting is; unset ones as comments."""
        lines = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            lines.append(f"# {field.description}")
            if value is None:
                lines.append(f"# {name} =")
            else:
                lines.append(f"{name} = {_toml(value)}")
        return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (f"{_toml(key)} = {_toml(each)}" for key, each in value.items())
        return "{" + ", ".join(pairs) + "}"
    # Not as ASCII: JSON writes some characters as two escapes, of which TOML knows neither.
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)


def read(
    flags: Mapping[str, Any], file: Path | None, environment: Mapping[str, str]
) -> ServerSettings:
    """Settings from all three; a flag that was not given is None, or not there.

    A variable that is empty counts as not given. Variables that are no settings are passed over;
    `ignored` tells of them.
    ValueError naming the setting, where it was given, and what is right.
    """
    found: dict[str, tuple[Any, str]] = {}
    if file is not None:
        found |= {name: (value, str(file)) for name, value in _table(file).items()}
    for name in ServerSettings.model_fields:
        variable = ENVIRONMENT + name.upper()
        value = environment.get(variable, "")
        if value and not _is_link(variable, value):
            found[name] = (value, variable)
    found |= {name: (value, _flag(name)) for name, value in flags.items() if value is not None}
    try:
        return ServerSettings(**{name: value for name, (value, _) in found.items()})
    except ValidationError as error:
        raise ValueError(
            _told(error, {name: where for name, (_, where) in found.items()})
        ) from None


def ignored(environment: Mapping[str, str]) -> list[str]:
    """A sentence for each variable that looks like a setting, and that `read` does not read.

    Not for what Kubernetes says of a Service that is called nuwa, unless it has a setting's name.
    """
    known = {ENVIRONMENT + name.upper() for name in ServerSettings.model_fields}
    told = []
    for variable, value in environment.items():
        name = variable.removeprefix(ENVIRONMENT)
        if not value or name == variable or variable in OTHER_VARIABLES:
            continue
        if variable in known:
            if _is_link(variable, value):
                told.append(
                    f"{variable}={value} is ignored: Kubernetes says so where a Service is next "
                    "door (enableServiceLinks: false keeps it from that)"
                )
        elif not (_OF_SERVICE.fullmatch(name) or _is_link(variable, value)):
            near = difflib.get_close_matches(variable, known, n=1)
            told.append(
                f"{variable} is ignored: there is no such setting"
                + (f"; is {near[0]} meant?" if near else "")
            )
    return told


def _is_link(variable: str, value: str) -> bool:
    """Whether it is not a port, but where Kubernetes has a Service's."""
    return variable.endswith("_PORT") and bool(_LINK.match(value))


def _table(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not TOML: {error}") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _told(error: ValidationError, where: Mapping[str, str]) -> str:
    told = []
    for each in error.errors():
        message = each["msg"].removeprefix("Value error, ")
        if not each["loc"]:
            told.append(message)
            continue
        name = str(each["loc"][0])
        if each["type"] == "extra_forbidden":
            names = ", ".join(ServerSettings.model_fields)
            told.append(f"{where[name]}: there is no setting {name!r}; there are {names}")
        else:
            told.append(f"{name} {each['input']!r} ({where[name]}): {message}")
    return "; ".join(told)
