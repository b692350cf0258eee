"""Quality of a model: likelihood, fidelity, class statistics."""
