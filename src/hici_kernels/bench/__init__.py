"""The benchmark frame: cases, correctness first, alternating timing, reports."""
