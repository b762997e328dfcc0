"""How models are named: `flights/3`, `flights@champion`, and `flights` for its champion."""

import re
from dataclasses import dataclass

from registry.errors import RegistryError

CHAMPION = "champion"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,99}")
_KEY_LETTERS = 200
_FORMS = "NAME/NUMBER, NAME@ALIAS and NAME (its champion) are allowed"


@dataclass(frozen=True)
class Reference:
    """A model, and a version by number or by alias.

    Attributes:
        name: The model.
        number: Of the version; None where `alias` says it.
        alias: None where `number` says it.
    """

    name: str
    number: int | None = None
    alias: str | None = None


def parse_reference(text: str) -> Reference:
    """The reference in a text.

    Raises:
        RegistryError: It is none.
    """
    name, slash, number = text.partition("/")
    if slash:
        if not _NAME.fullmatch(name) or not re.fullmatch(r"[0-9]{1,9}", number):
            raise RegistryError(f"received {text!r} as a model; {_FORMS}, such as flights/3.")
        return Reference(name, number=int(number))
    name, at, alias = text.partition("@")
    if not _NAME.fullmatch(name) or (at and not _ALIAS.fullmatch(alias)):
        raise RegistryError(f"received {text!r} as a model; {_FORMS}, such as flights@{CHAMPION}.")
    return Reference(name, alias=alias or CHAMPION)


def is_reference(text: str) -> bool:
    """Whether a text has the form of a reference, which some paths have as well."""
    try:
        parse_reference(text)
    except RegistryError:
        return False
    return True


def check_name(name: str) -> None:
    """Raises RegistryError unless a model may be called so."""
    if not _NAME.fullmatch(name):
        raise RegistryError(
            f"received {name!r} as a model's name; up to 100 letters, digits, '.', '_' and '-' are "
            "allowed, a letter or digit first. Choose another name."
        )


def check_alias(alias: str) -> None:
    """Raises RegistryError unless an alias may be called so."""
    if not _ALIAS.fullmatch(alias):
        raise RegistryError(
            f"received {alias!r} as an alias; up to 100 letters, digits, '.', '_' and '-' are "
            "allowed, a letter first. Choose another alias."
        )


def check_key(key: str) -> None:
    """Raises RegistryError unless a version may be registered with this key."""
    if not 0 < len(key) <= _KEY_LETTERS:
        raise RegistryError(
            f"received a key of {len(key)} letters; 1 to {_KEY_LETTERS} are allowed. Shorten it."
        )
