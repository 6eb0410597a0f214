"""Benches of samplers: parallel sampling, learned schedules and DDM, injected noise, text."""
