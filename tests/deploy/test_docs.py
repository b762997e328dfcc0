"""Commands that the documentation tells people to type are ones that `lockstep` parses."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.checks.commands import problems

DOCS = Path(__file__).parents[2] / "docs"
_COMMAND = re.compile(r"(?:^|\s|; |-- )(lockstep (?=[a-z])(?:[^;#>|]|\|(?=\w))+)")


def commands(text: str) -> Iterator[str]:
    """`lockstep` lines of blocks of code, alone or run in a pod; comments and redirects cut off."""
    fences = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks = [*fences, *re.findall(r"(?:^    .+\n)+", text, re.MULTILINE)]
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if line.split()[:1] in (["lockstep"], ["kubectl"]):
                plain = re.sub(r"[\[\]]", "", line.partition("  #")[0])
                yield from (found.strip() for found in _COMMAND.findall(plain))


@pytest.mark.parametrize(("name", "least"), [("deploy.md", 6), ("submitting.md", 6)])
def test_commands_parse(name, least):
    found = list(commands((DOCS / name).read_text()))
    assert len(found) >= least, found
    wrong = {text: problems(shlex.split(text)) for text in found}
    assert {text: why for text, why in wrong.items() if why} == {}


def test_a_command_that_does_not_parse_is_seen():
    text = (
        "```\nkubectl exec pod -- lockstep jobs stopp RUN\nlockstep jobs list; lockstep no\n```\n"
    )
    found = list(commands(text))
    assert found == ["lockstep jobs stopp RUN", "lockstep jobs list", "lockstep no"]
    assert [bool(problems(shlex.split(one))) for one in found] == [True, False, True]
