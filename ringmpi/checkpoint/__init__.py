"""Calls that are left in mid-way: what has been computed by then, its files, and how it goes on."""
