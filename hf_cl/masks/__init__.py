"""Scores to masks, masks to weights, masks to bytes. torch and numpy only."""
