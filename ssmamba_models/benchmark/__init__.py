"""Measurements of the scans and of the models, on the machine at hand. Nothing here runs on import."""
