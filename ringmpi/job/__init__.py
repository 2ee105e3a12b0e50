"""Whole files in, attention, whole files out."""
