"""The deliberate bugs that the tests must notice: run them with `python tools/mutate.py`."""

from __future__ import annotations

from mutation import Mutation
from mutations_calibration import CALIBRATION
from mutations_core import CORE
from mutations_evaluate import EVALUATE
from mutations_integer import INTEGER
from mutations_kernels import KERNELS
from mutations_model import MODEL
from mutations_nn import NN

__all__ = ["MUTATIONS", "Mutation"]

MUTATIONS: tuple[Mutation, ...] = (*CALIBRATION, *CORE, *INTEGER, *KERNELS, *NN, *MODEL, *EVALUATE)
