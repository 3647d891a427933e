"""The running merge: models absorbed one after another in constant memory."""
