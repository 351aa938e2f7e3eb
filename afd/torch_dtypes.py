"""afd.types.DType in torch's words: the one place where the two meet."""

from __future__ import annotations

import torch

from afd.types import DType

TORCH_DTYPES = {DType.FP32: torch.float32, DType.BF16: torch.bfloat16, DType.FP8: torch.float8_e4m3fn}
