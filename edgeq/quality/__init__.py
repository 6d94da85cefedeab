"""How good a model's computation is: against another checkpoint (`kld`), and layer by layer (`layerdiff`)."""
