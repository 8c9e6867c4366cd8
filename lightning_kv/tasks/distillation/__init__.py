"""Distillation in stages: clips are collected as lists, students fitted, rounds put together."""
