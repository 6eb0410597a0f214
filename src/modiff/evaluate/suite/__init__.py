"""What `modiff evaluate` runs: every configuration on the same seeds, judged against full precision and real images."""
