"""Radiology reports become study labels."""
