"""The environment says what is needed to compare figures, and nothing that names the machine."""

from __future__ import annotations

import json
import platform
import socket
from importlib import metadata

import torch

import modiff
from modiff.generate.environment import environment


def test_versions_and_threads_are_those_of_this_process_and_nothing_names_the_machine() -> None:
    values = environment()
    assert values["python"] == platform.python_version()
    assert values["diffusers"] == metadata.version("diffusers")
    assert values["modiff"] == modiff.__version__
    assert values["threads"] == torch.get_num_threads()
    assert not [word for word in (socket.gethostname(), "/home", "/root") if word in json.dumps(values)]
