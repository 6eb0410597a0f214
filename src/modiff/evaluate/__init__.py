"""Is it any good? Metrics of images and trajectories, and the small classifier whose features some of them use."""
