"""Which scheme for which site: costs, sensitivities, and the choice between them."""
