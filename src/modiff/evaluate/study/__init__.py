"""The trajectory study: each of the paper's experiments on a model of yours, what was printed, and why it differs."""
