"""How good a model is: likelihood, fidelity, class statistics."""
