"""x"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outside:
    cuda_context_bytes: int = 0
    nccl_bytes: int = 0
    library_bytes: int = 0
    assumptions: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        return self.cuda_context_bytes + self.nccl_bytes + self.library_bytes


NOTHING = Outside()
