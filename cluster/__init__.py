"""Processes: start, group, watch, replace. Knows Ray, knows no learning."""
