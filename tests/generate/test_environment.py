"""The environment says what is needed to compare figures, and nothing that names the machine."""

import json
import platform
import socket
from importlib import metadata

import torch

import modiff
from modiff.generate.environment import environment


def test_versions_and_threads_are_those_of_this_process_and_nothing_names_the_machine() -> None:
    values = environment()
    versions = [platform.python_version(), metadata.version("diffusers"), modiff.__version__, torch.get_num_threads()]
    assert [values[name] for name in ("python", "diffusers", "modiff", "threads")] == versions
    assert not [word for word in (socket.gethostname(), "/home", "/root") if word in json.dumps(values)]
