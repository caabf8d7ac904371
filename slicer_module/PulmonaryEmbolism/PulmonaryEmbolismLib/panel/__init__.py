"""The sections of the panel, from top to bottom. Each knows its own widgets, and the panel, which knows the others."""
