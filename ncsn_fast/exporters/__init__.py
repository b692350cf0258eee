"""Exporters: models as files for other runtimes."""
