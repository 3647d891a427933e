"""Rules of singular vectors."""
