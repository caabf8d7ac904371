"""Both networks, their losses, and a detection: what the model makes of a study."""
