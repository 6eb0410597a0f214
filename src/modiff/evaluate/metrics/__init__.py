"""Image metrics in float64; none of them knows which network the features come from."""
