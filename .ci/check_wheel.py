"""Run with the Python of an environment that has the wheel alone: what is native in it must work."""

import torch

from adapt_pruner import doctor, kernels

found = doctor.diagnose()
assert found["shard_io"] is None, found
assert found["backends"]["cpu"] is None, found
weight, grad = torch.randn(8, 16), torch.randn(8, 16)
native = kernels.unit_importance([weight], [grad], [0], [2], backend="cpu")
expected = (weight * grad).abs().sum(1).view(4, 2).sum(1)
torch.testing.assert_close(native, expected)
print("wheel works:", found["extension"])
