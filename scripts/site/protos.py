"""The gRPC API as a page: services, messages and enums of protos/, with their comments."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterator, Sequence

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

from scripts.site.pages import ROOT

_F = descriptor_pb2.FieldDescriptorProto
_ORDER = ("focus", "llm", "encoder", "image", "tensor", "error")
"""The files, the public API first."""

Comments = dict[tuple[int, ...], str]


def grpc_page() -> str:
    """The page. Raises RuntimeError where protoc refuses the files."""
    parts = [
        "# gRPC",
        "Package `focusllava.v1`, from the files in `protos/`. Clients need `FocusService` alone; the stages' services "
        "are what the gateway calls.",
    ]
    files = {pathlib.PurePath(file.name).stem: file for file in _described()}
    for name in (*_ORDER, *(name for name in files if name not in _ORDER)):
        file = files[name]
        comments = {
            tuple(where.path): where.leading_comments.strip() or where.trailing_comments.strip()
            for where in file.source_code_info.location
        }
        parts.append(f"## {name}.proto")
        for number, service in enumerate(file.service):
            parts += _service(service, comments, (6, number))
        for number, message in enumerate(file.message_type):
            parts += _message(message, comments, (4, number))
        for number, enum in enumerate(file.enum_type):
            parts += _enum(enum, comments, (5, number))
    return "\n\n".join(parts) + "\n"


def _described() -> Sequence[descriptor_pb2.FileDescriptorProto]:
    sources = sorted(str(path) for path in (ROOT / "protos" / "focusllava" / "v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "set"
        arguments = ["protoc", f"-I{ROOT / 'protos'}", "--include_source_info", f"--descriptor_set_out={out}"]
        if protoc.main([*arguments, *sources]) != 0:
            raise RuntimeError("protoc refuses protos/, see above")
        return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file


def _service(
    service: descriptor_pb2.ServiceDescriptorProto, comments: Comments, path: tuple[int, ...]
) -> Iterator[str]:
    yield f"### {service.name}"
    yield _text(comments.get(path, ""))
    for number, method in enumerate(service.method):
        returned = ("stream of " if method.server_streaming else "") + _link(method.output_type)
        yield f"**{method.name}**({_link(method.input_type)}) returns {returned}"
        yield _text(comments.get((*path, 2, number), ""))


def _message(message: descriptor_pb2.DescriptorProto, comments: Comments, path: tuple[int, ...]) -> Iterator[str]:
    yield f"### {message.name}"
    yield _text(comments.get(path, ""))
    maps = {entry.name: entry for entry in message.nested_type if entry.options.map_entry}
    rows = []
    for number, field in enumerate(message.field):
        entry = maps.get(field.type_name.rpartition(".")[2])
        if entry is not None:
            kind = f"map of {_kind(entry.field[0])} to {_kind(entry.field[1])}"
        else:
            kind = ("repeated " if field.label == _F.LABEL_REPEATED else "") + _kind(field)
        if field.proto3_optional:
            kind = f"optional {kind}"
        elif field.HasField("oneof_index"):
            kind = f"{kind}, one of `{message.oneof_decl[field.oneof_index].name}`"
        rows.append((f"{field.number}", f"`{field.name}`", kind, comments.get((*path, 2, number), "")))
    if rows:
        yield _table(("number", "field", "type", "meaning"), rows)


def _enum(enum: descriptor_pb2.EnumDescriptorProto, comments: Comments, path: tuple[int, ...]) -> Iterator[str]:
    yield f"### {enum.name}"
    yield _text(comments.get(path, ""))
    rows = [
        (f"{value.number}", f"`{value.name}`", comments.get((*path, 2, number), ""))
        for number, value in enumerate(enum.value)
    ]
    yield _table(("number", "value", "meaning"), rows)


def _kind(field: descriptor_pb2.FieldDescriptorProto) -> str:
    return _link(field.type_name) if field.type_name else _F.Type.Name(field.type).removeprefix("TYPE_").lower()


def _link(type_name: str) -> str:
    name = type_name.rpartition(".")[2]
    return f"[{name}](#{name.lower()})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_text(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _text(comment: str) -> str:
    """A comment on one line, with nothing in it that Markdown would take for its own."""
    return " ".join(comment.split()).replace("*", r"\*").replace("<", "&lt;")
