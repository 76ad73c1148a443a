"""Features of a teacher, of a dataset's records, from a companion set joined by key."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.data.readers.arrays import ArrayReader, Faults, Members
from pomscale.data.readers.companion import CompanionReader
from pomscale.shards.alignment import check_features
from pomscale.shards.schema import FEATURE_ARRAYS


class FeaturesReader(CompanionReader):
    """Reads the features of the records of a main set."""

    def __init__(self, main: ArrayReader, source: ArrayReader, *, flips: bool) -> None:
        """Open the features in `source`; `flips` says whether records will be mirrored, where the main set has flips.

        Raises InputError if they are not those of the main set's pictures, or if a table to join them is missing.
        """
        self.info = check_features(source.location, source.manifest, main.location, main.manifest, flips=flips)
        super().__init__(main, source, "features of a teacher")

    def read(self, members: Members, flips: np.ndarray, faults: Faults) -> Tensor:
        """Return features (b, n, dim) float16; rows with faults mean nothing.

        Args:
            members: Members of any array of the records in the main set.
            flips: Which pictures are mirrored (b,) bool: those get the features of the mirrored picture.
            faults: Faults of the batch.

        Raises:
            InputError: A picture is mirrored, and the set has no features of mirrored ones.
        """
        if flips.any() and not self.info.has_flip:
            raise InputError(f"dataset {self.source.location}: has no features of mirrored pictures")
        records, rows = self.rows(members, faults)
        if self.info.has_flip:
            chosen = Members.of_one(records, rows, FEATURE_ARRAYS, flips)
        else:
            chosen = Members.of(records, rows, FEATURE_ARRAYS[0])
        return self.source.same_shape(chosen, self.info.shape, faults)
