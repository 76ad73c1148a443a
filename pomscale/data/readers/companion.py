"""Records of a companion set (text embeddings, features), found for the records of a dataset by key."""

from __future__ import annotations

import numpy as np

from pomscale.data.readers.arrays import ArrayReader, Faults, Members
from pomscale.shards.join import join_remedy, open_join


class CompanionReader:
    """Finds the records of a main set in another one, its companion, which may be the main set itself."""

    def __init__(self, main: ArrayReader, source: ArrayReader, what: str) -> None:
        """Open the companion `source`, in which a record has a `what`.

        Raises InputError if a table to join the sets is missing, or their classes differ.
        """
        self.source = source
        self._main = main
        self._what = what
        self._table = open_join(main.location, main.manifest, source.location, source.manifest)

    def is_over(self, position: int) -> bool:
        """Return whether nothing is read for samples at this global position and later ones."""
        return False

    def shards(self, records: np.ndarray) -> np.ndarray:
        """Return the companion's shards that have these records of the main set."""
        rows = records if self._table is None else self._table[records]
        return np.unique(self.source.index["shard"][rows[rows >= 0]])

    def rows(self, members: Members, faults: Faults) -> tuple[np.ndarray, np.ndarray]:
        """Return record numbers and index rows in the companion; for rows with faults those of any record.

        Args:
            members: Members of any array of the records in the main set.
            faults: Faults of the batch; receives the records that are not in the companion.
        """
        records = members.records if self._table is None else self._table[members.records]
        inside = (records >= 0) & (records < len(self.source.index))
        records = np.where(inside, records, 0)
        rows = self.source.index.take(records)
        fits = inside & (rows["key"] == members.keys)
        for row in np.flatnonzero(~fits).tolist():
            if row not in faults:
                problem = f"it has no {self._what} in {self.source.location}, or the sets have changed"
                remedy = f"If they have, {join_remedy(self._main.location, self.source.location)}"
                faults[row] = self._main.fault(members, row, problem, remedy)
        self.source.check_rows(records, rows, faults)
        return records, rows
