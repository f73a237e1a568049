"""Adapting models: data. Knows no server and no terminal."""
