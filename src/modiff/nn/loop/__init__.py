"""One loop object per layer, `step(x) -> y`, with the input and the output state: simulated, on integers, in int16."""
