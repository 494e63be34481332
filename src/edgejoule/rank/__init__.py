"""Ranking measured models by accuracy per joule. Pure: no clocks, no devices, no files."""
