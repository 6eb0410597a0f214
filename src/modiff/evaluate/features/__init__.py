"""What images are turned into before they are compared as sets: extractors, and the names of results."""
