"""The only list of paged-attention kernels."""

from __future__ import annotations

from collections.abc import Callable

from afd.errors import ConfigError
from afd.layers.attention.base import PagedAttention
from afd.layers.attention.plain import BatchedPlainAttention, PlainAttention
from afd.native.attention import NativeAttention
from afd.native.library import load


def _native() -> PagedAttention:
    library = load()
    if library is None:
        raise ConfigError("attention kernel 'native' needs a C++ compiler, and AFD_KERNELS other than plain")
    return NativeAttention(library)


KERNELS: dict[str, Callable[[], PagedAttention]] = {
    "plain": PlainAttention,  # the oracle
    "batched": BatchedPlainAttention,
    "native": _native,  # compiled, for CPUs
}


def kernel(name: str) -> PagedAttention:
    """A new kernel by name; raises ConfigError with the choices for an unknown one."""
    if name not in KERNELS:
        raise ConfigError(f"attention kernel {name!r} does not exist; choose one of {', '.join(KERNELS)}")
    return KERNELS[name]()
