"""Data sets and the scenarios that split them into tasks."""
