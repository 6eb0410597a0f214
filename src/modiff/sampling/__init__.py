"""How is it sampled? Trajectories side by side, and samplers that know of quantization."""
