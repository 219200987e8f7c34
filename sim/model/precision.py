"""Which dtype each tensor has. Precision is chosen once and every op asks it here."""

from __future__ import annotations

from dataclasses import dataclass

from sim.ir.ledger import DType


@dataclass(frozen=True, slots=True)
class Precision:
    """Dtypes of a pass.

    ``stored``   dtype of the parameters as kept (and, without autocast, of every activation)
    ``low``      dtype of the tensors that matrix products read and write
    ``gemm``     what the tensor cores are asked for: ``low``, or "tf32" on fp32 tensors
    ``autocast`` torch.autocast: ``linear`` and attention in ``low``, what its lists name in fp32, the rest as it comes
                 (ATen/autocast_mode.h). Norms, ``pow``, ``rsqrt``, ``softmax``, ``log_softmax`` and ``sum`` are fp32.
    """

    stored: DType
    low: DType
    gemm: DType
    autocast: bool

    @staticmethod
    def of(parameter_dtype: DType, compute_dtype: DType, *, autocast: bool) -> Precision:
        """Return the dtypes; tf32 is a mode of the tensor cores, its tensors are fp32."""
        stored: DType = "fp32" if parameter_dtype == "tf32" else parameter_dtype
        low: DType = "fp32" if compute_dtype == "tf32" else compute_dtype
        return Precision(stored, low, compute_dtype, autocast and low != stored)


_WIDTH = {"fp32": 2, "fp16": 1, "bf16": 1}


def promote(left: DType, right: DType) -> DType:
    """Return the dtype of a pointwise op on both (torch's type promotion among floats)."""
    return left if _WIDTH[left] >= _WIDTH[right] else right
