"""Schedules: in which order blocks pass by, and how they move. They never import a backend."""
