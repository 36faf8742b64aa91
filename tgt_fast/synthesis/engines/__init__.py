"""Engines: who works at a synthesis. Each does whole batches, so that all give the same bits."""
