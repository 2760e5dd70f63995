"""Wallaroo Batch: distributed batch generation with the Wallaroo model on Ray."""
