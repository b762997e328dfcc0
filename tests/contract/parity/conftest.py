"""The suite's engines, each case run once an engine and kept for the package's tests."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.parity.cases import Case
from tests.contract.parity.report import Record, with_earlier, write_report

_CASES_A_GROUP = 25  # a process keeps what TensorFlow has traced: some 15 MB a case


class Suite:
    """Outcomes of all selected cases: engine A in this process, engine B in a pool."""

    def __init__(self, folder: Path, selected: dict[tuple[int, int], list[Case]]) -> None:
        from tests.contract.parity.pool import Pool

        self._folder = folder
        self._selected = selected
        self._prepared: dict[str, Any] = {}
        self._plain: dict[str, Any] = {}
        self._lockstep: dict[tuple[int, int], dict[str, Any]] = {}
        self._pool = Pool(4, folder / "logs")
        self.records: list[Record] = []

    def plain(self, case: Case) -> Any:
        """What plain Keras gives."""
        from tests.contract.parity.engines import run_plain

        if case.name not in self._plain:
            self._plain[case.name] = run_plain(self.prepared(case))
        return self._plain[case.name]

    def lockstep(self, case: Case, workers: int, devices: int = 1) -> Any:
        """What so many workers give, each of so many devices."""
        key = (workers, devices)
        found = self._lockstep.setdefault(key, {})
        if case.name not in found:
            at = self._selected[key].index(case)
            first = at - at % _CASES_A_GROUP
            cases = self._selected[key][first : first + _CASES_A_GROUP]
            entries = [(each.name, self.prepared(each), None) for each in cases]
            found |= self._pool.run(workers, devices, entries)
        return found[case.name]

    def sabotaged(self, case: Case, workers: int, sabotage: str) -> Any:
        """What comes out with one feature switched off."""
        entry = ("sabotaged", self.prepared(case), sabotage)
        return self._pool.run(workers, 1, [entry])["sabotaged"]

    def prepared(self, case: Case) -> Any:
        """The case with its files written."""
        from tests.contract.parity.engines import prepare

        if case.name not in self._prepared:
            folder = self._folder / f"case-{len(self._prepared)}"
            self._prepared[case.name] = prepare(case, folder)
        return self._prepared[case.name]

    def close(self) -> None:
        """End all processes."""
        self._pool.close()


@pytest.fixture(scope="package")
def suite(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Suite]:
    from cluster.runtime import Need, session

    selected: dict[tuple[int, int], list[Case]] = {}
    for item in request.session.items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if "case" in params and "workers" in params:
            cases = selected.setdefault((params["workers"], params.get("devices", 1)), [])
            if params["case"] not in cases:
                cases.append(params["case"])
    with session(Need(4, 1, 0)):
        made = Suite(tmp_path_factory.mktemp("parity"), selected)
        try:
            yield made
        finally:
            made.close()
    target = os.environ.get("LOCKSTEP_PARITY_REPORT")
    if target:
        legacy = Path(os.environ.get("LOCKSTEP_PARITY_LEGACY", "build/parity-legacy.json"))
        second = json.loads(legacy.read_text()) if legacy.exists() else {}
        records = with_earlier(Path("build/parity-records.json"), made.records)
        write_report(Path(target), records, second)
