"""Memory: what a model costs, before it is loaded (`plan`), and what it holds now (`ledger`)."""
