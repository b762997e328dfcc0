"""A run that learns nothing: it counts, keeps its count when told to go, and leaves traces.

`python stand_in.py RUN_FOLDER TICKS`: each tick takes a tenth of a second. SIGTERM: status 130, the
count is kept. Two of it at a time in one folder are a mistake, which it writes down.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

TICK_S = 0.1


def main() -> None:
    folder, ticks = Path(sys.argv[1]), int(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    lock = folder / "lock"
    count = folder / "count"
    note(folder, "start")
    try:
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        if alive(int(lock.read_text() or 0)):
            note(folder, "TWICE")
    lock.write_text(str(os.getpid()))
    try:
        done = int(count.read_text()) if count.exists() else 0
        while done < ticks:
            time.sleep(TICK_S)
            done += 1
            new = folder / "count.new"
            new.write_text(str(done))
            new.rename(count)
        (folder / "artifact").mkdir(exist_ok=True)
        (folder / "artifact" / "model.bin").write_bytes(bytes(range(256)) * 8192)
        (folder / "summary.json").write_text(json.dumps({"status": "done", "ticks": done}))
        note(folder, "done")
        print(f"counted to {done}; TOKEN is {len(os.environ.get('TOKEN', ''))} long", flush=True)
    finally:
        lock.unlink()
        note(folder, "end")


def note(folder: Path, what: str) -> None:
    with (folder / "trace").open("a") as file:
        file.write(f"{time.time():.3f} {what}\n")


def alive(pid: int) -> bool:
    return pid > 0 and Path(f"/proc/{pid}").exists()


if __name__ == "__main__":
    main()
