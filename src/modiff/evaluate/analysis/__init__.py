"""What `modiff analyze` shows: each layer and step, the growth of errors, distributions, and a sweep of bits."""
