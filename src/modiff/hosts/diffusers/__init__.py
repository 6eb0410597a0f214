"""Pipelines and models of diffusers; only `modiff.hosts.diffusers_host` loads this."""
