"""Judges of videos that are networks: VBench and LPIPS, their weights, and what is missing of them."""
