"""Files of any format as the rows that they are converted to."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from configs.data import DataConfig
from data_pipeline.ingest import ingested


def table_of(root: Path, entry: Path, **changes: Any) -> pa.Table:
    """The converted rows of what `entry` names."""
    data = DataConfig.model_validate(
        {
            "train": "unused",
            "features": ["x"],
            "label": "y",
            "ingest_dir": str(root / "cache"),
            **changes,
        }
    )
    return pa.concat_tables([pq.read_table(path) for path in ingested("train", str(entry), data)])
