"""Rendering rankings and measurements for people. Rendering never measures."""
