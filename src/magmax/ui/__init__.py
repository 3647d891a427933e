"""A page on this machine where a preference is tried before anything is merged."""
