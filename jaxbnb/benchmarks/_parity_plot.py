"""The curves of `jaxbnb bench parity`, drawn."""
def import_pyplot(): pass
def plot_parity(figures, plot): pass
