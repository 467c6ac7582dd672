"""How ranks share a model: the mesh, layers in parts and the table that says which, the loss, recomputation."""
