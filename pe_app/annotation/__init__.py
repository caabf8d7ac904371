"""What readers saw: reviewed slices, their outlines, and what to read next."""
