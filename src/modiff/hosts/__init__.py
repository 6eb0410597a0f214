"""Who hosts us? What modiff must know of a target: plain modules, and whatever comes from diffusers."""

import functools
from typing import Any

from modiff.hosts.host import Host, register_host
from modiff.private_names import DIFFUSERS, check_private_names


@functools.cache
def diffusers_host() -> Host:
    """The host of diffusers' pipelines and models. Loading it loads diffusers and tells it of modiff's format."""
    from modiff.hosts.diffusers.host import DiffusersHost
    from modiff.hosts.diffusers.quantizer import enter_tables

    check_private_names(DIFFUSERS)
    enter_tables()
    return DiffusersHost()


def _find(target: Any) -> Host | None:
    """Only an object whose class comes from diffusers loads its host."""
    known = any(kind.__module__.partition(".")[0] == "diffusers" for kind in type(target).__mro__)
    return diffusers_host() if known else None


_PLAIN = Host()
register_host(lambda _: _PLAIN)  # asked last
register_host(_find)
