"""Dispatches in FP8: e4m3 with one float32 scale for each token and 128 channels, as the Step-3 report sends them.

A group of channels is divided by its scale, which is its largest finite magnitude over 448, e4m3's own largest. So a
value comes back within a sixteenth of itself, or within scale / 1024 where it is below a 28,672th of its group's
largest. NaN stays NaN and touches no other value; infinities come back as the group's largest magnitude (448 scales).
Plain torch, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from afd.transport.shape import SCALE_CHANNELS, scale_groups

LARGEST = 448.0  # torch.finfo(torch.float8_e4m3fn).max; beyond it a plain conversion gives NaN
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of a group of zeros, too


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """values [tokens, channels] -> the same in float8_e4m3fn, and scales [tokens, groups] in float32."""
    tokens, channels = values.shape
    groups = _grouped(values.float())  # [tokens, groups, 128]
    largest = groups.nan_to_num(0.0, 0.0, 0.0).abs().amax(-1)  # [tokens, groups]
    scales = (largest / LARGEST).clamp_min(_SMALLEST_SCALE)
    scaled = (groups / scales[..., None]).clamp(-LARGEST, LARGEST)
    return scaled.to(torch.float8_e4m3fn).view(tokens, -1)[:, :channels].contiguous(), scales


def dequantise(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantise` gave -> [tokens, channels] in `dtype`."""
    tokens, channels = values.shape
    groups = _grouped(values.float()) * scales[..., None]  # [tokens, groups, 128]
    return groups.to(dtype).view(tokens, -1)[:, :channels].contiguous()


def _grouped(values: Tensor) -> Tensor:
    """[tokens, channels] -> [tokens, groups, 128], zeros behind the last channel."""
    tokens, channels = values.shape
    missing = scale_groups(channels) * SCALE_CHANNELS - channels
    return (pad(values, (0, missing)) if missing else values).reshape(tokens, -1, SCALE_CHANNELS)
