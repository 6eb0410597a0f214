"""Who hosts us? What modiff must know of a target: plain modules, text models, and whatever comes from diffusers."""

import functools
from typing import Any

from modiff.hosts.host import Host, register_host
from modiff.hosts.text import TextHost, text_network
from modiff.private_names import DIFFUSERS, check_private_names


@functools.cache
def diffusers_host() -> Host:
    """The host of diffusers' pipelines and models. Loading it loads diffusers and tells it of modiff's format."""
    from modiff.hosts.diffusers.host import DiffusersHost
    from modiff.hosts.diffusers.quantizer import enter_tables

    check_private_names(DIFFUSERS)
    enter_tables()
    return DiffusersHost()


@functools.cache
def _diffusers_text(generation: str) -> Host:
    from modiff.hosts.diffusers.text import DiffusersTextHost

    diffusers_host()
    return DiffusersTextHost(generation)


def _of_diffusers(target: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == "diffusers" for kind in type(target).__mro__)


def _find(target: Any) -> Host | None:
    """Only an object whose class comes from diffusers loads its host."""
    return diffusers_host() if _of_diffusers(target) else None


def _find_text(target: Any) -> Host | None:
    """What reads tokens, from diffusers or not."""
    if text_network(target) is None:
        return None
    return _diffusers_text(getattr(type(target), "generation", "__call__")) if _of_diffusers(target) else _TEXT


_PLAIN, _TEXT = Host(), TextHost()
register_host(lambda _: _PLAIN)  # asked last
register_host(_find)
register_host(_find_text)
