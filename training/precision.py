"""Whether lower precision is faster on this machine."""

import time

import torch


def bfloat16_is_faster() -> bool:
    """Whether this machine multiplies bf16 matrices in hardware: some emulate it, 100 times slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(64, 576, dtype=dtype), torch.ones(576, 576, dtype=dtype)
        left @ right
        begin = time.perf_counter()
        for _ in range(4):
            left @ right
        seconds[dtype] = time.perf_counter() - begin
    return seconds[torch.bfloat16] < seconds[torch.float32]
