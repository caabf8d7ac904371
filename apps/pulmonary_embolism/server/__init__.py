"""The REST interface: who may ask for what, and how much of it."""
