"""Studies and runs as figures and pages: what is drawn here was computed in `study`."""
