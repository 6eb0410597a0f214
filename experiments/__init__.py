"""The experiments of the MoDiff paper on a model of yours: what the paper printed, what comes out, why they differ."""
