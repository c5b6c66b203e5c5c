"""Scaling laws: read a table, fit a law to it, judge the fit, and plan with it."""
