"""Measurements: ``tgt-fast bench`` and ``tgt-fast profile``, and the measuring code of the repository's benchmarks.

An op noun has one file here, which lists its cases: what is computed, its rivals, its check, and the bytes that have to
move.
"""
