"""Whether a user's JSON schema can be given to an engine. Nothing is ever fetched.

A schema that the engine chokes on costs more than its own job, so it is checked at submission.
"""

from functools import lru_cache
from typing import Any, Final
from urllib.parse import unquote

import orjson
from jsonschema import Draft202012Validator, SchemaError
from jsonschema.validators import validator_for

#: Checking takes about 4 ms per kB.
MAX_SCHEMA_BYTES: Final = 64 * 1024
_REFERENCES: Final = ("$ref", "$dynamicRef", "$recursiveRef")


def schema_problem(schema: dict[str, Any]) -> str | None:
    """What is wrong with `schema` as a whole clause, or None.

    Remembers its answers, since bulk jobs repeat their schema.
    """
    text = orjson.dumps(schema)
    if len(text) > MAX_SCHEMA_BYTES:
        return f"is a schema of {len(text)} bytes; give at most {MAX_SCHEMA_BYTES}"
    return _problem_of_text(text)


@lru_cache(maxsize=256)
def _problem_of_text(text: bytes) -> str | None:
    schema: dict[str, Any] = orjson.loads(text)
    return _metaschema_problem(schema) or _reference_problem(schema)


def _metaschema_problem(schema: dict[str, Any]) -> str | None:
    if not isinstance(schema.get("$schema", ""), str):
        return "is not a valid JSON schema: $schema must be a string"
    dialect = validator_for(schema, default=Draft202012Validator)
    try:
        dialect.check_schema(schema)
    except SchemaError as error:
        message = error.message if len(error.message) <= 200 else error.message[:200] + "…"
        return f"is not a valid JSON schema: at {error.json_path}: {message}"
    except RecursionError:
        return "is a JSON schema nested too deeply to check; flatten it"
    except (ValueError, OverflowError, TypeError) as error:
        # the checker itself failed on the input, as it does on a regex that repeats 2^32 times
        return f"is not a valid JSON schema: {error}"
    return None


def _reference_problem(schema: dict[str, Any]) -> str | None:
    open_nodes: list[Any] = [schema]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, list):
            open_nodes.extend(node)
        if not isinstance(node, dict):
            continue
        open_nodes.extend(node.values())
        for keyword in _REFERENCES:
            target = node.get(keyword)
            if isinstance(target, str) and not target.startswith("#"):
                return (
                    f"refers to {target[:200]!r} by {keyword}: nothing is fetched; "
                    "put the definition under $defs and refer to it as '#/$defs/…'"
                )
            if isinstance(target, str) and not _leads_somewhere(schema, target):
                return f"refers to {target[:200]!r} by {keyword}, which is not in the schema"
    return None


def _leads_somewhere(schema: Any, reference: str) -> bool:
    """Whether a JSON pointer in fragment form hits a value; an anchor (`#name`) is taken as is."""
    if not reference.startswith("#/"):
        return True
    node = schema
    for part in unquote(reference[2:]).split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and key in node:
            node = node[key]
        elif isinstance(node, list) and key.isascii() and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        else:
            return False
    return True
