"""Rows of bytes from anywhere in memory, side by side."""
