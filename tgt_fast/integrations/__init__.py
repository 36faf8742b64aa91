"""Adapters for the frameworks that people train in, one module a framework: none is imported until it is named."""
