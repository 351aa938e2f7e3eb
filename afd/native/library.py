"""The compiled kernels as Python sees them: structs and functions of src/kernels.cpp, field by field.

`load` gives the library, or None where it cannot be had; the plain torch layers then do the same work, slower.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p

from afd import env
from afd.errors import ConfigError
from afd.native import build

log = logging.getLogger(__name__)

VERSION = 1  # afd_version() of the sources beside this file


class CLinear(Structure):
    """struct Linear: a packed weight [n, k]."""

    _fields_ = (("data", c_void_p), ("n", c_int64), ("k", c_int64))


class CHeads(Structure):
    """struct Heads."""

    _fields_ = tuple((name, c_int64) for name in ("heads", "kv_heads", "dim", "block_size"))


class CStep(Structure):
    """struct Step."""

    _fields_ = (
        *((name, c_int64) for name in ("tokens", "sequences", "table_stride", "block_size")),
        *((name, c_void_p) for name in ("query_starts", "context_lens", "block_tables", "slots", "positions")),
    )


class CAttentionLayer(Structure):
    """struct AttentionLayer."""

    _fields_ = (
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "dim", "block_size")),
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("qkv", CLinear),
        ("q_rank", c_int64),
        ("inter_norm", c_void_p),
        ("wq", CLinear),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("rope", c_void_p),
        ("out", CLinear),
        ("gate", CLinear),
        *((name, c_int64) for name in ("experts", "top_k", "renormalise")),
        ("eps", c_float),
        ("scale", c_float),
    )


class CFfnLayer(Structure):
    """struct FfnLayer."""

    _fields_ = (
        ("hidden", c_int64),
        ("always_up", CLinear),
        ("always_down", CLinear),
        *((name, c_int64) for name in ("first", "local", "total")),
        ("experts_up", POINTER(CLinear)),
        ("experts_down", POINTER(CLinear)),
    )


_I, _P = c_int64, c_void_p

_FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "afd_version": (_I, ()),
    "afd_lanes": (_I, ()),
    "afd_packed_size": (_I, (_I, _I, _I, _I)),
    "afd_pack": (None, (_I, _P, _I, _I, _I, _P)),
    "afd_width": (_I, ()),
    "afd_linear": (None, (_I, _I, _P, _P, _I, _P)),
    "afd_columns": (None, (_I, _I, _P, _P, _I, _I, _I, _P)),
    "afd_rms_norm": (None, (_I, _P, _P, _I, _I, c_float, _P)),
    "afd_expect_scattered": (None, (_P, _I)),
    "afd_store_kv": (None, (_I, _P, _P, _P, _P, _P, _P)),
    "afd_attend": (None, (_I, _I, _P, _P, _P, _P, _P, c_float, _P)),
    "afd_attention_half": (None, (_I, _I, _P, _P, _P, _P, _P, _P, _P, _P, _P)),
    "afd_ffn_half": (_I, (_I, _I, _P, _P, _I, _P, _P, _I, _P)),
    "afd_best": (None, (_P, _I, _I, _P)),
}


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, compiled if need be; None, and one sentence in the log, where AFD_KERNELS says `plain` or it cannot
    be compiled. Raises ConfigError when AFD_KERNELS says `native` and it cannot.

    Its functions let go of the interpreter lock while they run.
    """
    wanted = env.read().kernels
    if wanted == "plain":
        return None
    try:
        found = ctypes.CDLL(str(build.library()))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (build.NoCompiler, OSError, AttributeError) as error:
        if wanted == "native":
            raise ConfigError(f"AFD_KERNELS is native, but the kernels cannot be compiled: {error}") from error
        log.warning("plain torch instead of compiled kernels, several times slower: %s", error)
        return None
    assert found.afd_version() == VERSION, f"the kernels are version {found.afd_version()}, not {VERSION}"
    return found
