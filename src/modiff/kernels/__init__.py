"""How is it fast? One operator schema, several backends, a dispatch that says why, and the fused input side."""
