"""The schemas in tests/unit/cluster/crds.json: python -m tests.crds FILE...

Each file is a CustomResourceDefinition of KubeRay (ray-operator/config/crd/bases, v1.7.0) or of the Prometheus operator
(example/prometheus-operator-crd, v0.93.0). Descriptions, nine tenths of them, are left out; what occurs twice stands
once, under `$defs`; and a field that a schema does not name is refused, where a Kubernetes server would drop it.
"""

from __future__ import annotations

import collections
import json
import pathlib
import sys
from typing import Any

import yaml

FILE = pathlib.Path(__file__).parent / "unit" / "cluster" / "crds.json"
SHARED_CHARACTERS = 150
"""The least length of what is worth a name."""


def schemas(files: list[pathlib.Path]) -> dict[str, Any]:
    """The schema of each file's kind, in the version that is stored, and what they share."""
    found = {}
    for file in files:
        definition = yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        version = next(each for each in definition["versions"] if each["storage"])
        found[definition["names"]["kind"]] = bare(version["schema"]["openAPIV3Schema"])
    return shared(found)


def bare(node: Any) -> Any:
    """A schema without descriptions, closed to fields that it does not name."""
    if isinstance(node, list):
        return [bare(each) for each in node]
    if not isinstance(node, dict):
        return node
    closed = "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields") and "type" in node
    kept = {name: bare(value) for name, value in node.items() if name != "description" or not isinstance(value, str)}
    return kept | ({"additionalProperties": False} if closed else {})


def shared(kinds: dict[str, Any]) -> dict[str, Any]:
    """The same schemas, with what occurs more than once under `$defs`."""
    count: collections.Counter[str] = collections.Counter()
    names: dict[str, str] = {}
    definitions: dict[str, Any] = {}

    def look(node: Any) -> None:
        if isinstance(node, (dict, list)):
            count[json.dumps(node, sort_keys=True)] += 1
            for each in node.values() if isinstance(node, dict) else node:
                look(each)

    def shrunk(node: Any) -> Any:
        if isinstance(node, list):
            return [shrunk(each) for each in node]
        if not isinstance(node, dict):
            return node
        text = json.dumps(node, sort_keys=True)
        smaller = {name: shrunk(each) for name, each in node.items()}
        if count[text] < 2 or len(text) < SHARED_CHARACTERS or "type" not in node:
            return smaller
        name = names.setdefault(text, str(len(names)))
        definitions[name] = smaller
        return {"$ref": f"#/$defs/{name}"}

    look(kinds)
    kinds = {kind: shrunk(schema) for kind, schema in kinds.items()}
    return {"$defs": definitions, **kinds}


def text(content: dict[str, Any]) -> str:
    """JSON with a line a definition and a line a kind."""
    definitions = ",\n".join(
        f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in content["$defs"].items()
    )
    kinds = ",\n".join(
        f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in content.items() if k != "$defs"
    )
    return f'{{"$defs": {{\n{definitions}\n}},\n{kinds}}}\n'


if __name__ == "__main__":
    FILE.write_text(text(schemas([pathlib.Path(name) for name in sys.argv[1:]])), encoding="utf8")
