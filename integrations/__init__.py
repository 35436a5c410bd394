"""Thin translations between kvcomp's core and inference engines."""
