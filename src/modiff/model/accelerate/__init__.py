"""The search behind `modiff.accelerate`: the front of settings, loops that are timed, and what was gained."""
