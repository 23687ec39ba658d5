"""Table: how the dataset's tables are described.

Place in the flow: a leaf, under `schema.py` and `studies.py`, which list them.
"""

from dataclasses import dataclass

import pyarrow as pa

i32, i64, f32, f64, text = pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.string()
half_vector = pa.list_(pa.float16())


@dataclass(frozen=True)
class Table:
    """One table: its columns with their descriptions, the key that orders its rows, and how it is partitioned."""

    name: str
    doc: str
    columns: tuple[tuple[str, pa.DataType, str], ...]
    key: tuple[str, ...]
    by_layer: bool = True

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of a part file (the `layer` column lives in the folder's name)."""
        return pa.schema([pa.field(n, t, metadata={"doc": d}) for n, t, d in self.columns])
