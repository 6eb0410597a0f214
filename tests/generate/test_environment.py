"""The environment says what compares figures, and nothing that names the machine."""

from __future__ import annotations

import json
import platform
import socket
from importlib import metadata

import torch

import modiff
from modiff.generate.environment import environment


def test_versions_and_threads_are_those_of_this_process() -> None:
    found = environment()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["diffusers"] == metadata.version("diffusers")
    assert found["modiff"] == modiff.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1
    assert found["cpu"]


def test_it_is_json_and_holds_neither_host_name_nor_path() -> None:
    text = json.dumps(environment())
    assert socket.gethostname() not in text
    assert "/home" not in text
    assert "/root" not in text
