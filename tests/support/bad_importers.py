"""Stands in for the process that imports: does what a hostile file might bring it to."""

import ctypes
import json
import os
import sys
import tempfile
import time

from trainer.importing import print_answer


def main() -> None:
    """What the request's label asks for."""
    request = json.loads(sys.stdin.read())
    deed = request["label"]
    if deed.endswith("_with_files"):
        unpacked = tempfile.mkdtemp(prefix="lockstep-import-")
        with open(request["folder"], "w") as file:
            file.write(unpacked)
        deed = deed.removesuffix("_with_files")
    if deed == "hang":
        print("pid", os.getpid(), flush=True)
        time.sleep(600)
    if deed == "eat":
        held = []
        while True:
            held.append(bytearray(50_000_000))
    if deed == "crash":
        ctypes.string_at(0)
    if deed == "fork":
        if os.fork() == 0:
            time.sleep(600)
        with open(os.path.join(request["folder"]), "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)
    if deed == "fill":
        with open(request["folder"], "wb") as file:
            while True:
                file.write(bytes(50_000_000))
    if deed == "tell":
        print_answer({"refused": json.dumps(dict(os.environ))})
    if deed == "silence":
        sys.exit(0)


if __name__ == "__main__":
    main()
