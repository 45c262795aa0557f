"""Measures this machine: every ratio against a plain implementation in the same run, interleaved."""
