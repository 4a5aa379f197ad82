"""Counts the FLOPs that a model really runs, to be held against the accountant."""

import torch


class MatrixProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """FLOPs of every matrix product and depthwise convolution that is dispatched."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        operands = {
            aten.mm.default: (0, 1),
            aten.bmm.default: (0, 1),
            aten.addmm.default: (1, 2),
            aten.baddbmm.default: (1, 2),
            aten.bmm.out: (0, 1),
            aten.baddbmm.out: (1, 2),
        }
        result = func(*args, **(kwargs or {}))
        if func in operands:
            a, b = (args[i] for i in operands[func])
            # rotary angles are the one product of a column with a row: (batch, head_dim / 2, 1) x (batch, 1, seq)
            if a.shape[-1] > 1 or a.shape[-2] == 1:
                self.flops += 2 * a.numel() * b.shape[-1]
        elif func is aten.convolution.default:
            self.flops += 2 * result.numel() * args[1].shape[-1]
        elif "scaled_dot_product" in func.__name__:
            raise AssertionError(f"{func} is not counted; use eager attention")
        return result
