"""Many users at once, for a while: no failure but refusals by quota, and memory that stays."""

import json
import os
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from serving.accounts import Quotas
from serving.errors import QuotaExceeded
from tests.support.batches import Dispatching, Place, expected, rows

USERS = 200
SECONDS = float(os.environ.get("LOCKSTEP_LOAD_S", "60"))


def resident_mb(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


def growth_mb(sizes):
    """By a line through all of them, from the first to the last."""
    return np.polyfit(np.arange(len(sizes)), sizes, 1)[0] * len(sizes)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_hundred_users(tmp_path):
    place = Place(tmp_path / "place", runner={"sweep_s": 1.0}, inline=False)
    tables = [rows(n, seed=n) for n in (1, 50, 400)]
    paths = [place.write(table, f"{n}.parquet") for n, table in enumerate(tables)]
    accounts = []
    for n in range(USERS):
        accounts.append(place.user(f"u{n}", quotas=Quotas(queued_jobs=2), weight=1.0 + n % 2))
        place.accounts.allow_input(f"u{n}", str(place.data), who="test")
    stop, seen, lock = threading.Event(), Counter(), threading.Lock()
    failures = []

    def use(part):
        """One thread is many users: submits, looks, lists, cancels, reads and removes."""
        turn = 0
        mine = {}
        while not stop.is_set():
            turn += 1
            account = part[turn % len(part)]
            try:
                kind = turn % 3
                values = {"model": "fake", "input": paths[kind], "output_expires_after_s": 60}
                job, _ = place.service.submit(account, values)
                mine[job.id] = (account, kind)
                if turn % 17 == 0:
                    place.service.cancel(account, job.id)
                outcome = "submitted"
            except QuotaExceeded:  # 429
                outcome = "refused"
            except Exception as error:
                failures.append(error)
                return
            with lock:
                seen[outcome] += 1
            for name, (owner, kind) in list(mine.items())[:4]:
                job = place.service.job(owner, name)
                if job.is_active:
                    continue
                if job.status == "completed" and turn % 5 == 0:
                    manifest = place.service.output(owner, name)
                    parts = [Path(job.folder, part["name"]) for part in manifest["parts"]]
                    found = pq.read_table(parts)["prediction"].to_numpy()
                    np.testing.assert_allclose(found, expected(tables[kind]), rtol=1e-5)
                with lock:
                    seen[job.status] += 1
                place.service.delete_output(owner, name)
                del mine[name]
            place.service.jobs(account)
            time.sleep(0.5)

    threads = [threading.Thread(target=use, args=(accounts[n::16],)) for n in range(16)]
    dispatching = Dispatching(place.config)
    place.wait(place.submit(input=paths[0]))  # the loop and its predictors are up
    # The loop that dispatches, and this process, in which the service takes jobs and tells of them.
    sizes = {dispatching.process.pid: [], os.getpid(): []}
    for thread in threads:
        thread.start()
    began = time.monotonic()
    while (passed_s := time.monotonic() - began) < SECONDS:
        time.sleep(1.0)
        if passed_s > SECONDS / 3:
            for pid, found in sizes.items():
                found.append(resident_mb(pid))
    stop.set()
    for thread in threads:
        thread.join(60)
    deadline = time.monotonic() + 120
    while left := len(place.service._store.active_jobs()):
        assert time.monotonic() < deadline, f"{left} jobs have not ended"
        time.sleep(0.2)
    dispatching.close()
    place.close()
    dispatcher, service = sizes.values()
    growths = [round(growth_mb(found), 1) for found in (dispatcher, service)]
    told = {"growth_mb": growths, "mb": [round(dispatcher[-1], 1), round(service[-1], 1)]}
    print(json.dumps({**seen, **told}))
    assert failures == []
    assert seen["completed"] >= 16
    assert seen["failed"] == 0
    assert max(growths) < 40
