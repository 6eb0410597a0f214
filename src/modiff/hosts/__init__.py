"""Who hosts us? The verbs on any target, and the one place that knows diffusers' pipelines."""
