"""A weight matrix in the kernels' layout, and the product with it."""

from __future__ import annotations

import ctypes
from collections.abc import Generator
from ctypes import byref, c_void_p

import torch
from torch import Tensor

from afd.native.library import CLinear, load

DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear:
    """y = x · weightᵀ for a weight [n, k] on the CPU, float32 or bfloat16 with an even k.

    With `pairs`, weight is gate [n, k] on top of up [n, k], which only the FFN kernels can use. The plain weight is not
    kept. A row of y depends on the same row of x alone, to the last bit, whatever else is in the batch.
    """

    def __init__(self, library: ctypes.CDLL, weight: Tensor, *, pairs: bool = False) -> None:
        assert weight.dtype in DTYPES, f"the kernels know no {weight.dtype}"
        weight = weight.contiguous()
        rows, k = weight.shape
        n, wide = rows // 2 if pairs else rows, int(weight.dtype is torch.float32)
        self._library = library
        self._wide = wide
        self.dtype = weight.dtype
        self.n, self.k = n, k
        # 64 bytes more, to begin on a cache line.
        size = int(library.afd_packed_size(wide, n, k, int(pairs)))
        room = torch.empty(size + 64 // weight.itemsize, dtype=weight.dtype)
        skip = -room.data_ptr() % 64 // weight.itemsize
        self.packed = room[skip : skip + size]
        library.afd_pack(wide, weight.data_ptr(), n, k, int(pairs), self.packed.data_ptr())
        padded_k = k if wide else k + k % 2
        self.struct = CLinear(c_void_p(self.packed.data_ptr()), 2 * n if pairs else n, padded_k)
        self._address = byref(self.struct)

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, k] -> [rows, n], both of the weight's dtype."""
        x = self._checked(x)
        out = torch.empty((x.shape[0], self.n), dtype=self.dtype)
        self._library.afd_linear(
            self._wide, torch.get_num_threads(), self._address, x.data_ptr(), x.shape[0], out.data_ptr()
        )
        return out

    def in_slices(self, x: Tensor, work: int) -> Generator[None, None, Tensor]:
        """x [rows, k] -> [rows, n] float32, some columns at a time: yields after each slice of about `work` results,
        but the last."""
        x, out = self._checked(x), torch.empty((x.shape[0], self.n), dtype=torch.float32)
        rows, width = x.shape[0], self._library.afd_width()
        at_once = max(1, work // max(1, rows) // width) * width
        for first in range(0, self.n, at_once):
            if first:
                yield
            self._library.afd_columns(
                self._wide, torch.get_num_threads(), self._address, x.data_ptr(), rows, first,
                min(self.n, first + at_once), out.data_ptr(),
            )  # fmt: skip
        return out

    def _checked(self, x: Tensor) -> Tensor:
        assert x.dtype is self.dtype, f"x is {x.dtype}, the weight {self.dtype}"
        assert x.dim() == 2, f"x is {list(x.shape)}, not [rows, {self.k}]"
        assert x.shape[1] == self.k == self.struct.k, f"x is {list(x.shape)}, the weight takes {self.k} columns"
        return x.contiguous()


def best_columns(x: Tensor) -> Tensor:
    """The index [rows] int64 of each row's largest value, the first of equal ones; x [rows, columns] float32."""
    library = load() if x.device.type == "cpu" else None
    if library is None:
        return x.argmax(dim=-1)
    x, best = x.contiguous(), torch.empty(x.shape[0], dtype=torch.int64)
    assert x.dtype is torch.float32, f"x is {x.dtype}, not float32"
    library.afd_best(x.data_ptr(), *x.shape, best.data_ptr())
    return best
