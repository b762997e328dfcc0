"""Parquet files of a few rows."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = dict[str, Any]


def write_parquet(path: Path, columns: Rows, block_rows: int = 4) -> str:
    """Write columns (lists, or arrays with a type) in blocks of `block_rows`; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=block_rows)
    return str(path)
