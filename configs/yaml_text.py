"""YAML text in, plain values out: the one way in which files and overrides are read.

Whatever is wrong with a text is a `yaml.YAMLError`, with the line where it is known. PyYAML by
itself lets errors of Python through, for a date such as 2013-13-45 or a text that is nested
without end.
"""

import re
from typing import Any

import yaml

_FLOAT = "tag:yaml.org,2002:float"
_EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """YAML as PyYAML reads it, except that 1e-3 is a number, as in YAML 1.2."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, OverflowError) as error:
            kind = str(node.tag).rpartition(":")[2]
            why = f" ({error})" if isinstance(error, ValueError) else ""
            problem = f"{str(node.value)[:80]!r} is no {kind}{why}; a text stands in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


class Dumper(yaml.SafeDumper):
    """Writes what `parse_yaml` reads: quotes the text '1e-3'."""


for _kind in (_Loader, Dumper):
    _kind.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: It is no YAML, or a value in it is none that its form promises.
    """
    try:
        return yaml.load(text, _Loader)  # a safe loader
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
