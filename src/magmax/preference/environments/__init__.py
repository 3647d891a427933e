"""The benchmark of preferences: what each is worth where tasks occur in another mixture than they were learned in."""
