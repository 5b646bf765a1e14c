"""Procedural multi-camera worlds of exactly known geometry: to train and to measure on."""
