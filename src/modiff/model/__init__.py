"""What can I do to a model? One verb per file: select, apply, remove, trajectory, calibrate, tune."""
