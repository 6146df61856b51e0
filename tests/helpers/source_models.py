"""User code whose parts a fingerprint has to notice."""

import functools
import math

from torch import nn

WIDTH = 3
TABLE = {"rate": [0.1, 0.2]}


def helper():
    return WIDTH


class Base(nn.Module):
    def size(self):
        return helper()


class Net(Base):
    @property
    def rate(self):
        return TABLE["rate"]

    def forward(self, x):
        return [math.sin(self.size()) for _ in x]


def make(bias=True):
    return Net()


partial = functools.partial(make, bias=False)


def recursive(depth):
    return recursive(depth - 1)
