"""File formats: each file here reads one; the table of them all is in table.py."""
