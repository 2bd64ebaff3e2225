"""The rule `cosine`: its region, window and refresh."""
