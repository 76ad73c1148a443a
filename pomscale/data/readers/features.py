"""Features of a teacher, of a dataset's records, from a companion set joined by key."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.data.readers.arrays import ArrayReader, Faults, Members
from pomscale.data.readers.companion import CompanionReader
from pomscale.shards.alignment import check_features
from pomscale.shards.schema import FEATURE_ARRAYS


class FeaturesReader(CompanionReader):
    """Reads the features of the records of a main set."""

    def __init__(self, main: ArrayReader, source: ArrayReader, *, flips: bool, until: int | None) -> None:
        """Open the features in `source`.

        Args:
            main: The main set.
            source: The set that has its features.
            flips: Whether records will be mirrored, where the main set has flips.
            until: Global position from which on features are zeros, and nothing is read; None = none.

        Raises:
            InputError: They are not those of the main set's pictures, or a table to join them is missing.
        """
        self.info = check_features(source.location, source.manifest, main.location, main.manifest, flips=flips)
        super().__init__(main, source, "features of a teacher")
        self._until = until

    def is_over(self, position: int) -> bool:
        return self._until is not None and position >= self._until

    def read(self, members: Members, positions: np.ndarray, flips: np.ndarray, faults: Faults) -> Tensor:
        """Return features (b, n, dim) float16; rows with faults mean nothing.

        Args:
            members: Members of any array of the records in the main set.
            positions: Global positions of the records (b,) int64.
            flips: Which pictures are mirrored (b,) bool: those get the features of the mirrored picture.
            faults: Faults of the batch.

        Raises:
            InputError: A picture is mirrored, and the set has no features of mirrored ones.
        """
        if self.is_over(int(positions.min())):
            return torch.zeros((len(positions), *self.info.shape), dtype=torch.float16)
        if flips.any() and not self.info.has_flip:
            raise InputError(f"dataset {self.source.location}: has no features of mirrored pictures")
        records, rows = self.rows(members, faults)
        if self.info.has_flip:
            chosen = Members.of_one(records, rows, FEATURE_ARRAYS, flips)
        else:
            chosen = Members.of(records, rows, FEATURE_ARRAYS[0])
        return self.source.same_shape(chosen, self.info.shape, faults)
