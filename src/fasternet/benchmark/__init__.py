"""Measures operators (Table 1) and networks (Table 3) on this machine, beside the paper's numbers."""
