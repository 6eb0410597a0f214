"""Inception-v3 of the TensorFlow weights, block by block as in the paper's figures; imports nothing of modiff."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, max_pool2d


class Inception:
    """From a state dict, in float64. last_pool: of the very last block. TensorFlow's averages count no padding."""

    def __init__(self, tensors: Mapping[str, Tensor], last_pool: str = "maximum", count_padding: bool = False) -> None:
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.last_pool, self.count_padding = last_pool, count_padding

    def unit(self, name: str, x: Tensor, stride: int = 1, padding: tuple[int, int] = (0, 0)) -> Tensor:
        t = self.tensors
        x = conv2d(x, t[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, var = t[f"{name}.bn.running_mean"], t[f"{name}.bn.running_var"]
        return batch_norm(x, mean, var, t[f"{name}.bn.weight"], t[f"{name}.bn.bias"], eps=1e-3).relu()

    def average(self, x: Tensor) -> Tensor:
        return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=self.count_padding)

    def at_35(self, n: str, x: Tensor) -> Tensor:
        five = self.unit(f"{n}.branch5x5_2", self.unit(f"{n}.branch5x5_1", x), padding=(2, 2))
        double = self.unit(f"{n}.branch3x3dbl_2", self.unit(f"{n}.branch3x3dbl_1", x), padding=(1, 1))
        double = self.unit(f"{n}.branch3x3dbl_3", double, padding=(1, 1))
        return torch.cat(
            [self.unit(f"{n}.branch1x1", x), five, double, self.unit(f"{n}.branch_pool", self.average(x))], 1
        )

    def to_17(self, n: str, x: Tensor) -> Tensor:
        double = self.unit(f"{n}.branch3x3dbl_2", self.unit(f"{n}.branch3x3dbl_1", x), padding=(1, 1))
        double = self.unit(f"{n}.branch3x3dbl_3", double, stride=2)
        return torch.cat([self.unit(f"{n}.branch3x3", x, stride=2), double, max_pool2d(x, 3, stride=2)], 1)

    def at_17(self, n: str, x: Tensor) -> Tensor:
        row, column = (0, 3), (3, 0)
        seven = self.unit(f"{n}.branch7x7_2", self.unit(f"{n}.branch7x7_1", x), padding=row)
        seven = self.unit(f"{n}.branch7x7_3", seven, padding=column)
        double = self.unit(f"{n}.branch7x7dbl_1", x)
        for index, padding in ((2, column), (3, row), (4, column), (5, row)):
            double = self.unit(f"{n}.branch7x7dbl_{index}", double, padding=padding)
        return torch.cat(
            [self.unit(f"{n}.branch1x1", x), seven, double, self.unit(f"{n}.branch_pool", self.average(x))], 1
        )

    def to_8(self, n: str, x: Tensor) -> Tensor:
        three = self.unit(f"{n}.branch3x3_2", self.unit(f"{n}.branch3x3_1", x), stride=2)
        seven = self.unit(f"{n}.branch7x7x3_2", self.unit(f"{n}.branch7x7x3_1", x), padding=(0, 3))
        seven = self.unit(f"{n}.branch7x7x3_4", self.unit(f"{n}.branch7x7x3_3", seven, padding=(3, 0)), stride=2)
        return torch.cat([three, seven, max_pool2d(x, 3, stride=2)], 1)

    def at_8(self, n: str, x: Tensor, pool: str) -> Tensor:
        def fork(name: str, y: Tensor) -> list[Tensor]:
            return [self.unit(f"{name}a", y, padding=(0, 1)), self.unit(f"{name}b", y, padding=(1, 0))]

        three = fork(f"{n}.branch3x3_2", self.unit(f"{n}.branch3x3_1", x))
        double = self.unit(f"{n}.branch3x3dbl_2", self.unit(f"{n}.branch3x3dbl_1", x), padding=(1, 1))
        pooled = self.average(x) if pool == "average" else max_pool2d(x, 3, stride=1, padding=1)
        parts = [*three, *fork(f"{n}.branch3x3dbl_3", double), self.unit(f"{n}.branch_pool", pooled)]
        return torch.cat([self.unit(f"{n}.branch1x1", x), *parts], 1)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Averages, the seven sFID channels (N, 7, 17, 17), and logits without bias of (N, 3, 299, 299)."""
        x = self.unit("Conv2d_1a_3x3", x.double(), stride=2)
        x = self.unit("Conv2d_2b_3x3", self.unit("Conv2d_2a_3x3", x), padding=(1, 1))
        x = max_pool2d(x, 3, stride=2)
        x = self.unit("Conv2d_4a_3x3", self.unit("Conv2d_3b_1x1", x))
        x = max_pool2d(x, 3, stride=2)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.at_35(name, x)
        x = self.at_17("Mixed_6c", self.at_17("Mixed_6b", self.to_17("Mixed_6a", x)))
        spatial = self.unit("Mixed_6d.branch1x1", x)[:, :7]
        x = self.at_17("Mixed_6e", self.at_17("Mixed_6d", x))
        x = self.at_8("Mixed_7c", self.at_8("Mixed_7b", self.to_8("Mixed_7a", x), "average"), self.last_pool)
        pooled = x.mean(dim=(2, 3))
        return pooled, spatial, pooled @ self.tensors["fc.weight"].T
