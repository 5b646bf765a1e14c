"""Procedural multi-camera worlds whose geometry is known exactly: data to train and to measure on."""
