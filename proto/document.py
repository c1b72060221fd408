"""Writes docs/api.md from the comments of proto/nuwa/v1: `python proto/document.py`.

Needs grpcio-tools (the `dev` extra) and knows nothing of the runtime.
"""

from __future__ import annotations

import importlib.resources
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parent
SOURCE = "nuwa/v1/generation.proto"
TARGET = ROOT.parent / "docs" / "api.md"

# Numbers of the fields of FileDescriptorProto and of what is in it, which comments are found by.
MESSAGES, ENUMS, SERVICES = 4, 5, 6
FIELDS, VALUES, METHODS = 2, 2, 2
SYNTAX = 12

Field = descriptor_pb2.FieldDescriptorProto
SCALARS = {
    Field.TYPE_DOUBLE: "double",
    Field.TYPE_INT64: "int64",
    Field.TYPE_INT32: "int32",
    Field.TYPE_BOOL: "bool",
    Field.TYPE_STRING: "string",
    Field.TYPE_BYTES: "bytes",
}


def document() -> str:
    """The page, as Markdown. RuntimeError if protoc refuses the file."""
    file = _described()
    comments = {
        tuple(where.path): (where.leading_comments or where.leading_detached_comments[-1]).strip()
        for where in file.source_code_info.location
        if where.leading_comments or where.leading_detached_comments
    }
    return "\n".join([*_page(file, comments), ""])


def _described() -> descriptor_pb2.FileDescriptorProto:
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "descriptors"
        arguments = [
            "protoc",
            f"--proto_path={ROOT}",
            f"--proto_path={importlib.resources.files('grpc_tools') / '_proto'}",
            "--include_source_info",
            f"--descriptor_set_out={out}",
            SOURCE,
        ]
        if protoc.main(arguments) != 0:
            raise RuntimeError(f"protoc could not compile {SOURCE}")
        return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file[0]


def _page(
    file: descriptor_pb2.FileDescriptorProto, comments: dict[tuple[int, ...], str]
) -> Iterator[str]:
    yield f"# The gRPC interface `{file.package}`"
    yield ""
    yield f"Made by `proto/document.py` from `proto/{SOURCE}`, where it is changed."
    yield ""
    yield "```text"
    yield comments[(SYNTAX,)].replace("\n ", "\n")
    yield "```"
    for s, service in enumerate(file.service):
        yield from ("", f"## {service.name}", "", _prose(comments[SERVICES, s]))
        for m, method in enumerate(service.method):
            answer = f"[{_short(method.output_type)}](#{_anchor(method.output_type)})"
            if method.server_streaming:
                answer = f"stream of {answer}"
            asked = f"[{_short(method.input_type)}](#{_anchor(method.input_type)})"
            yield from ("", f"### {method.name}", "", f"{asked} → {answer}", "")
            yield _prose(comments[SERVICES, s, METHODS, m])
    yield from ("", "## Messages")
    for i, message in enumerate(file.message_type):
        yield from ("", f"### {message.name}", "", _prose(comments[MESSAGES, i]))
        if message.field:
            yield from ("", "| field | number | type | |", "| --- | ---: | --- | --- |")
        for f, field in enumerate(message.field):
            said = _prose(comments[MESSAGES, i, FIELDS, f])
            choice = _choice(message, field)
            said = f"One of `{choice}`. {said}" if choice else said
            yield f"| `{field.name}` | {field.number} | {_type(field)} | {said} |"
    yield from ("", "## Enumerations")
    for e, enum in enumerate(file.enum_type):
        yield from ("", f"### {enum.name}", "", _prose(comments[ENUMS, e]), "")
        yield from ("| value | number | |", "| --- | ---: | --- |")
        for v, value in enumerate(enum.value):
            yield f"| `{value.name}` | {value.number} | {_prose(comments[ENUMS, e, VALUES, v])} |"


def _prose(comment: str) -> str:
    return " ".join(line.strip() for line in comment.splitlines()).replace("|", "\\|")


def _type(field: descriptor_pb2.FieldDescriptorProto) -> str:
    name = SCALARS.get(field.type) or _linked(field.type_name)
    if field.label == Field.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _linked(type_name: str) -> str:
    if type_name.startswith(".nuwa."):
        return f"[{_short(type_name)}](#{_anchor(type_name)})"
    return f"`{type_name.lstrip('.')}`"


def _choice(
    message: descriptor_pb2.DescriptorProto, field: descriptor_pb2.FieldDescriptorProto
) -> str | None:
    """The oneof that a field belongs to, if it is one of the file's own."""
    if field.proto3_optional or not field.HasField("oneof_index"):
        return None
    return message.oneof_decl[field.oneof_index].name


def _short(type_name: str) -> str:
    return type_name.rpartition(".")[2]


def _anchor(type_name: str) -> str:
    return _short(type_name).lower()


def main() -> int:
    TARGET.write_text(document())
    print(TARGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
