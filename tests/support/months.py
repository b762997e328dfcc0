"""The flights of 2013 as a folder that grows month by month, some of its months with wrong labels.

    python -m tests.support.months FLIGHTS FOLDER MONTH [--corrupt]

FLIGHTS is what `lockstep example flights` has written.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

LABEL = "arr_delay"


def lay_down(flights: Path, folder: Path, month: int, is_corrupt: bool = False) -> Path:
    """Put one month into the folder, whole or not at all.

    Corrupt: each row has the label of another one, turned to its negative.
    """
    (source,) = flights.glob(f"*/2013-{month:02d}.parquet")
    table = pq.read_table(source)
    if is_corrupt:
        labels = table[LABEL].to_numpy()
        wrong = -np.random.default_rng(month).permutation(labels)
        index = table.schema.get_field_index(LABEL)
        table = table.set_column(index, table.schema.field(LABEL), pa.array(wrong, pa.float32()))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.name
    partial = folder / f".{source.name}.partial"
    pq.write_table(table, partial, row_group_size=16_384)
    partial.replace(target)
    return target


def main() -> None:
    """Lay one month down."""
    flights, folder, month, *more = sys.argv[1:]
    print(lay_down(Path(flights), Path(folder), int(month), "--corrupt" in more))


if __name__ == "__main__":
    main()
