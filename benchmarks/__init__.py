"""Measurements: speed, quality, rivals. Nothing here is needed to use the packages."""
