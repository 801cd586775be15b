"""GeoPrelabel: a Label Studio ML backend for aerial, satellite and drone imagery."""

__version__ = "0.1.0"
