"""Schedules: which rank computes with what, and how it gets there. They never import a backend."""
