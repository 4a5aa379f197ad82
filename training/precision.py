"""Whether lower precision is faster on this machine."""

import time

import torch


def bfloat16_is_faster() -> bool:
    """Whether this machine multiplies bf16 matrices in hardware: some emulate it, 100 times slower.

    Of accelerators other than GPUs it is believed, not measured.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():
        return True
    return _seconds(torch.bfloat16) < _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """Shortest time of a product, since others use the machine too."""
    left, right = torch.ones(64, 576, dtype=dtype), torch.ones(576, 576, dtype=dtype)
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        left @ right
        found.append(time.perf_counter() - begin)
    return min(found)
