"""The studies, their labels and models: what is kept and what counts."""
