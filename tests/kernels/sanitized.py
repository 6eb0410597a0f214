"""Run tests on compiled loops that check their memory and arithmetic: python -m tests.kernels.sanitized ARGUMENTS.

The address sanitizer has to be in the process before anything else: LD_PRELOAD. With "overflow" instead of arguments of
pytest, a loop is told to read 64 bytes behind a tensor, which must end the process.
"""

import sys

import pytest
import torch

from modiff.kernels import native

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g")


def main(arguments: list[str]) -> int:
    """The exit status."""
    native._FLAGS = (*native._FLAGS, *FLAGS)
    if arguments != ["overflow"]:
        return pytest.main(arguments)
    library = native.load_library("fingerprint").library
    values = torch.zeros(64, dtype=torch.uint8)
    return 3 if library is None else int(library.modiff_fingerprint(values.data_ptr(), 128, 1)) * 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
