"""MimicBrush: reference-imitation editing of pictures, independent of any host application."""

__version__ = "0.1.0"
