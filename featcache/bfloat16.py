"""`bfloat16` of the zarr-extensions registry for zarr-python, which has none of its own.

Declared in the entry-point group `zarr.data_type`. Until zarr-python loads what is declared there,
a program that reads bf16 stores with zarr itself says `import featcache.bfloat16` first. The native
dtype is `ml_dtypes.bfloat16`, as in tensorstore, and both read what the other wrote.

Source: https://github.com/zarr-developers/zarr-extensions, data-types/bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.npy.float import BaseFloat

_NATIVE = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(BaseFloat[Any, Any]):
    """Zarr v3 data type "bfloat16": 2 bytes, little-endian on disk by the `bytes` codec."""

    dtype_cls = type(_NATIVE)
    _zarr_v3_name = "bfloat16"
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype[Any]) -> Self:
        from zarr.core.dtype.common import DataTypeValidationError

        if dtype != _NATIVE:
            raise DataTypeValidationError(f"expected {_NATIVE}, got {dtype}")
        return cls()

    def to_native_dtype(self) -> np.dtype[Any]:
        # ml_dtypes has the machine's byte order only; the `bytes` codec swaps where that is big.
        return _NATIVE

    @property
    def item_size(self) -> int:
        return 2


# zarr-python 3.1.6 collects the entry point and then never loads it (`DataTypeRegistry._lazy_load`
# has no caller), so importing this module registers the type too.
data_type_registry.register(BFloat16._zarr_v3_name, BFloat16)
